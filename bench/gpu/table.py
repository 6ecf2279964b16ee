"""The results of bench/gpu/measure.py as text; needs neither torch nor the package."""

from __future__ import annotations

from typing import Any

PEERS = ("torch.compile", "eager")


def table(results: dict[str, Any]) -> str:
    """One line per case: each backend's time, GB/s and share of the ceiling; peers as multiples."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for m in results["measurements"]:
        rows.setdefault((m["job"], m["rows"], m["vocab_size"]), {})[m["contender"]] = m
    backends = results["backends"]
    best = results["ceilings_gb_per_s"]
    lines = [
        f"{results['device']}, commit {results['commit']}: "
        + ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in best.items()),
        f"{'job':20}{'rows':>6} {'V':>7}"
        + "".join(f" |{name:>10} us  GB/s    %" for name in backends)
        + " | compile  eager (times the best of ours)",
    ]
    for (job, n_rows, vocab_size), by in rows.items():
        line = f"{job:20}{n_rows:6} {vocab_size:7}"
        for name in backends:
            m = by.get(name)
            line += " |" + (
                f"{m['median_us']:13.1f}{m['gb_per_s']:6.0f}{m['share']:5.0%}" if m else 24 * "-"
            )
        ours = [by[name]["median_us"] for name in backends if name in by]
        for name in PEERS:
            peer = by[name]["median_us"] / min(ours) if ours and name in by else None
            line += f"{'' if peer is None else f'{peer:.2f}x':>8}"
        lines.append(line)
    for group in ("left_out", "failed"):
        lines += [f"{group}: {name}: {why}" for name, why in results[group].items()]
    return "\n".join(lines)
