"""Races: accesses to one byte, one of them a write, that nothing orders.

For each byte are known the thread that wrote it last and the one that read it last, each with its
time. A time counts the barriers that a thread has passed: of its cluster, its CTA and its warp.
Threads of a warp are ordered by bar.warp.sync and by barriers above, threads of a CTA by barriers
of the CTA or the cluster, CTAs of a cluster by its barriers, and other CTAs by nothing.

An instruction's accesses are simultaneous: two threads that write one byte race, unless both write
the same value.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

# Bits of a time.
CLUSTER, CTA = 40, 16
# Readers: a thread is its number + 1, several threads of CTA c are -(c + 2), those of several CTAs
# of cluster k are -(k + WIDE), those of several clusters are FAR.
NOBODY, FAR, WIDE = 0, -1, 1 << 30


def time_of(cluster: ndarray, cta: ndarray, warp: ndarray) -> ndarray:
    """Join numbers of barriers passed, so that an earlier time is a smaller number."""
    return (cluster.astype(np.int64) << CLUSTER) + (cta.astype(np.int64) << CTA) + warp


class Threads:
    """Threads of an access: who they are, and when it is.

    Args:
        number: [n] in the grid.
        time: [n] `time_of`.
        per_cta: threads of a CTA.
        per_cluster: threads of a cluster.
    """

    def __init__(self, number: ndarray, time: ndarray, per_cta: int, per_cluster: int) -> None:
        self.number, self.time = number, time
        self.per_cta, self.per_cluster = per_cta, per_cluster

    def repeated(self, n: int) -> Threads:
        """Each n times."""
        number, time = np.repeat(self.number, n), np.repeat(self.time, n)
        return Threads(number, time, self.per_cta, self.per_cluster)

    def race_with(self, who: ndarray, when: ndarray) -> ndarray:  # [n] each -> [n]
        """Whether an earlier access by `who` is not ordered before this one."""
        other = who - 1
        same_cta = other // self.per_cta == self.number // self.per_cta
        same_warp = other // 32 == self.number // 32
        ordered = same_cta & (when >> CTA < self.time >> CTA)
        ordered |= same_warp & (when < self.time)
        if self.per_cluster > self.per_cta:
            same_cluster = other // self.per_cluster == self.number // self.per_cluster
            ordered |= same_cluster & (when >> CLUSTER < self.time >> CLUSTER)
        return (who > 0) & (other != self.number) & ~ordered

    @property
    def cta(self) -> ndarray:
        return self.number // self.per_cta

    @property
    def cluster(self) -> ndarray:
        return self.number // self.per_cluster

    def cluster_of(self, reader: ndarray) -> ndarray:
        """Cluster of a reader or of several; -1 for FAR."""
        of_cta = cta_of(reader, self.per_cta) * self.per_cta // self.per_cluster
        return np.where(reader <= -WIDE, -reader - WIDE, of_cta)

    def race_with_many(self, reader: ndarray, when: ndarray) -> ndarray:  # [n] each -> [n]
        """Whether reads by several threads, the last at `when`, are not ordered before this."""
        ordered = (-reader - 2 == self.cta) & (when >> CTA < self.time >> CTA)
        if self.per_cluster > self.per_cta:
            same_cluster = self.cluster_of(reader) == self.cluster
            ordered |= same_cluster & (when >> CLUSTER < self.time >> CLUSTER)
        return (reader < NOBODY) & ~ordered


# Fields of a record of each byte.
FIELDS = {"writer": np.int32, "written_at": np.int64, "reader": np.int32, "read_at": np.int64}


def cta_of(reader: ndarray, per_cta: int) -> ndarray:
    return np.where(reader > NOBODY, (reader - 1) // per_cta, -reader - 2)


def check(records: dict[str, ndarray], index: ndarray, by: Threads, *, store: bool) -> str | None:
    """Compare an access with the last ones to the same bytes, and record it.

    Args:
        records: the fields, [bytes] each.
        index: [n] the bytes.
        by: [n] threads.
        store: whether they write.

    Returns:
        The first race in words; None: there is none.
    """
    writer = records["writer"][index]
    found = None
    if writer.any():
        bad = by.race_with(writer, records["written_at"][index])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            what = "write" if store else "read"
            found = f"{what} by thread {by.number[at]} after a write by thread {writer[at] - 1}"
    if store:
        found = _check_readers(records, index, by) or found
        records["writer"][index] = by.number + 1
        records["written_at"][index] = by.time
    else:
        _add_readers(records, index, by)
    return found


def _check_readers(records: dict[str, ndarray], index: ndarray, by: Threads) -> str | None:
    reader = records["reader"][index]
    if not reader.any():
        return None
    read_at = records["read_at"][index]
    bad = by.race_with(reader, read_at) | by.race_with_many(reader, read_at)
    if not bad.any():
        return None
    at = int(np.flatnonzero(bad)[0])
    who = "several threads" if reader[at] < NOBODY else f"thread {reader[at] - 1}"
    return f"write by thread {by.number[at]} after a read by {who}"


def _add_readers(records: dict[str, ndarray], index: ndarray, by: Threads) -> None:
    """Record reads; those that this one is not ordered after still count."""
    reader, read_at = records["reader"][index], records["read_at"][index]
    own, alone, near = -(by.cta + 2), by.number + 1, -(by.cluster + WIDE)
    if reader.any():
        still = by.race_with(reader, read_at) | by.race_with_many(reader, read_at)
        same = cta_of(reader, by.per_cta) == by.cta
        several = np.where(by.cluster_of(reader) == by.cluster, near, FAR)
        records["reader"][index] = np.where(still, np.where(same, own, several), alone)
    else:
        records["reader"][index] = alone
    records["read_at"][index] = by.time
    last = records["reader"][index]  # several threads at once: one stays
    lost = (last != alone) & (last != own) & (last != near) & (last != FAR)
    if lost.any():
        same = cta_of(last, by.per_cta) == by.cta
        beside = by.cluster_of(last) == by.cluster
        for which, several in ((same, own), (beside & ~same, near), (~beside, FAR)):
            which = lost & which
            records["reader"][index[which]] = np.broadcast_to(several, lost.shape)[which]
