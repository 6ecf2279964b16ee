"""A run's report: a line while it goes, metrics.jsonl, and at the end a table and a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kl_kernels.files import opener, write_atomically, write_text
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.text import printable

if TYPE_CHECKING:  # imported only to draw, at the end of a run
    from matplotlib.figure import Figure

Record = dict[str, Any]  # one update: phase 7 in loop.py

COLUMNS = {
    "update": "update",
    "proxy": "proxy",
    "gold": "gold",
    "kl": "KL",
    "kl_coef": "beta",
    "entropy": "entropy",
    "length": "length",
    "clip_fraction": "clipped",
}


class MetricsLog:
    """metrics.jsonl, a line per update, flushed to disk before the update's checkpoint."""

    def __init__(self, path: Path, *, keep: int) -> None:
        """Open the file, and keep its first `keep` lines; later ones belong to no checkpoint."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines()[:keep] if path.exists() else []
        if len(lines) < keep:
            raise ValueError(f"'{path}' has {len(lines)} lines, but the checkpoint is of {keep}")
        write_text(path, "".join(line + "\n" for line in lines))

    def append(self, record: Record) -> None:
        with open(self.path, "a", encoding="utf-8", opener=opener) as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def progress_line(record: Record) -> str:
    gold = "" if record["gold"] is None else f" gold {record['gold']:.2f}"
    return (
        f"reward {record['proxy']:.2f}{gold} | KL {record['kl']:.1f} beta {record['kl_coef']:.3f} "
        f"| entropy {record['entropy']:.2f} | length {record['length']:.0f}"
    )


def table(records: list[Record]) -> str:
    """Set about a dozen of the updates as a table, first and last among them."""
    step = max(1, round(len(records) / 12))
    shown = [r for r in records if r["update"] % step == 0 or r is records[0] or r is records[-1]]
    rows = [list(COLUMNS.values())]
    for record in shown:
        rest = (record[name] for name in list(COLUMNS)[1:])
        rows.append([str(record["update"]), *("-" if x is None else f"{x:.3f}" for x in rest)])
    return "\n".join("".join(f"{cell:>9}" for cell in row) for row in rows)


def drift_line(drift: dict[str, Any]) -> str:
    """Name the tokens that carry the last answers' KL."""
    tokens = (f"{token['text']!r} {token['share']:.0%}" for token in drift["tokens"][:5])
    return f"tokens with most of that KL at the end: {', '.join(tokens)}"


def summary(config: PPOConfig, records: list[Record], drift: dict[str, Any]) -> str:
    """Compare start and end: rewards and KL in words, and a sample of each."""
    first, last_third = records[0], records[-max(1, len(records) // 3) :]

    def late_mean(name: str) -> float:
        return fmean(record[name] for record in last_third)

    rise = (late_mean("proxy") - first["proxy"]) / first["proxy_sd"] if first["proxy_sd"] else 0.0
    lines = [
        f"proxy reward: {first['proxy']:.2f} at the start, "
        f"{late_mean('proxy'):.2f} over the last third "
        f"({rise:+.1f} standard deviations of the first batch)"
    ]
    if first["gold"] is not None:
        lines.append(
            f"gold score:   {first['gold']:.2f} at the start, "
            f"{late_mean('gold'):.2f} over the last third"
        )
    target = f", target {config.kl_target:g}" if config.controller != "fixed" else ""
    lines.append(f"KL per answer: {late_mean('kl'):.1f} nats over the last third{target}")
    lines.append(drift_line(drift))
    lines += [
        f"a sample, prompt | answer, of update {r['update']}:\n    {one_line(r['sample'])}"
        for r in (first, records[-1])
    ]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Make a sample safe to print: one line, without control characters."""
    return printable(" ".join(text.split()))


def draw(path: Path, config: PPOConfig, records: list[Record]) -> None:
    """Draw rewards, KL, beta and entropy over the updates, as a PNG."""
    figure = curves(config, records)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=200))


def curves(config: PPOConfig, records: list[Record]) -> Figure:
    """Draw each of them in a panel of its own; 6 inches wide, it can be read at 400 pixels."""
    # pyplot would keep global state and look for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 9), layout="constrained")
    rewards, kl, beta, entropy = figure.subplots(4, 1, sharex=True)
    updates = [record["update"] for record in records]

    def curve(axes: Any, name: str, color: str, label: str | None = None) -> None:
        values = [record[name] for record in records]
        axes.plot(updates, values, ".-", color=color, label=label, markersize=3)

    curve(rewards, "proxy", "tab:blue", "proxy (trained on)")
    if records[0]["gold"] is not None:
        curve(rewards, "gold", "tab:orange", "gold (only reported)")
    rewards.set_title("reward per answer")
    rewards.legend()

    curve(kl, "kl", "tab:blue")
    if config.controller != "fixed":
        kl.axhline(config.kl_target, color="gray", linestyle="--", label="target")
        kl.legend()
    kl.set_title("exact KL(policy || reference) [nats per answer]")

    curve(beta, "kl_coef", "tab:blue")
    beta.set_title(f"beta, {config.controller}")
    curve(entropy, "entropy", "tab:blue")
    entropy.set_title("entropy [nats per token]")
    entropy.set_xlabel("update")
    for axes in (rewards, kl, beta, entropy):
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False)  # a fixed beta of 0.1 is 0.1, not 0 + 1e-1
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    task = config.model or "the embedded task"
    figure.suptitle(f"PPO on {printable(task)}, seed {config.seed}, {len(records)} updates")
    return figure
