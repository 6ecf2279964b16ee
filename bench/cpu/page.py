"""Tables of `bench.cpu.side_by_side`, for docs/benchmarks.md and the README."""

from __future__ import annotations

from typing import Any

from bench.cpu.side_by_side import OURS, PASSES, WRITES

Results = dict[str, Any]
OTHERS = ("torch.compile", "eager")
NAMES = {  # in the README
    "stats": "logprob + entropy",
    "forward": "exact KL",
    "forward+backward": "exact KL + gradient",
    "policy loss": "policy loss",
}
SHOWN_ROWS, SHOWN_DTYPE = 64, "bfloat16"


def cases(results: Results) -> dict[tuple[str, str, int], dict[str, Results]]:
    """Measurements by job, dtype and rows, then by contender."""
    found: dict[tuple[str, str, int], dict[str, Results]] = {}
    for m in results["measurements"]:
        found.setdefault((m["job"], m["dtype"], m["rows"]), {})[m["contender"]] = m
    return found


def tables(results: Results) -> str:
    """Show each contender's times over ours, warm and cold, and what cold costs us per logit."""
    return "\n\n".join([times_table(results), cost_table(results), about(results)])


def times_table(results: Results) -> str:
    header = [f"V = {results['measurements'][0]['vocab_size']}", "rows"]
    for state in ("warm", "cold"):
        header += [f"{state}: kl_kernels", "in two visits", *OTHERS]
    lines = [row([*header, "extra MB", "page faults"]), row(["---"] * (len(header) + 2))]
    for (job, dtype, n_rows), by in cases(results).items():
        shown = [by[name] for name in (OURS, *OTHERS)]
        cells = [f"{job}, {dtype}", str(n_rows)]
        for state in ("warm", "cold"):
            cells += [ours(by[OURS][state]), ratio(by.get("in two visits"), state)]
            cells += [ratio(by[name], state) for name in OTHERS]
        cells.append(" / ".join(f"{m['extra_mb']:.0f}" for m in shown))
        cells.append(" / ".join(f"{m['page_faults']:.0f}" for m in shown))
        lines.append(row(cells))
    return "\n".join(lines)


def cost_table(results: Results) -> str:
    """Cold time per logit of the most rows over warm time per logit of the fewest."""
    by_case = cases(results)
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in by_case))
    rows = [n_rows for _, _, n_rows in by_case]
    few, many = min(rows), max(rows)
    head = f"{many} rows cold over {few} warm, per logit (GB/s, of plain loops')"
    lines = [row([head, *dtypes]), row(["---"] * (1 + len(dtypes)))]
    for job in PASSES:
        plain = results["read_write_gb_per_s" if job in WRITES else "read_gb_per_s"]
        cells = [job]
        for dtype in dtypes:
            cold, warm = by_case[job, dtype, many][OURS], by_case[job, dtype, few][OURS]
            cost = cold["cold"]["median_ms"] / many / (warm["warm"]["median_ms"] / few)
            rate = cold["cold_gb_per_s"]
            cells.append(f"{cost:.2f}x ({rate:.1f}, {rate / plain:.0%})")
        lines.append(row(cells))
    return "\n".join(lines)


def about(results: Results) -> str:
    clock = {"wall": "", "thread": ", of the time that the thread had a core"}[results["clock"]]
    return (
        f"Medians of {results['rounds']} interleaved rounds{clock} (fastest to slowest), the "
        "others as multiples of ours in the same round (lowest to highest). Cold: after reading "
        f"{results['swept_bytes'] >> 20} MiB, {results['swept_bytes'] // results['cache_bytes']} "
        "times the last-level cache; warm: once more right after that. Memory and faults of a "
        "call: ours / torch.compile / eager. stats: `token_stats`; forward: `token_kl`; backward: "
        "the gradient of logprob + kl + entropy; policy loss: `fused_policy_loss` and its "
        "gradient, in two visits: the same from `token_kl` and `ppo_policy_loss`. GB/s counts the "
        "bytes that must pass through memory at the least; plain loops (a sum, a maximum) read "
        f"{results['read_gb_per_s']:.0f} GB/s, or read two tensors and write a third with "
        f"{results['read_write_gb_per_s']:.0f}. {made(results)}"
    )


def sentence(results: Results) -> str:
    """For the README: torch.compile beside ours, cold and warm."""
    by_job = {job: cases(results)[job, SHOWN_DTYPE, SHOWN_ROWS]["torch.compile"] for job in NAMES}
    shown = ", ".join(
        f"{name} {by_job[job]['cold']['ratio']:.1f}x ({by_job[job]['warm']['ratio']:.1f}x)"
        for job, name in NAMES.items()
    )
    vocab_size = results["measurements"][0]["vocab_size"]
    return (
        f"{SHOWN_ROWS} x {vocab_size} logits in memory, as a model leaves them; torch.compile "
        f"over ours (warm): {shown}. From `bench/results/cpu.json`."
    )


def made(results: Results) -> str:
    return (
        f"{results['device']} with {results['threads']} thread(s); torch "
        f"{results['facts']['torch']}, commit {results['commit']}. From `bench/results/cpu.json`, "
        "made by `make bench-cpu`."
    )


def ours(times: Results) -> str:
    return f"{times['median_ms']:.1f} ms ({times['fastest_ms']:.1f} to {times['slowest_ms']:.1f})"


def ratio(measurement: Results | None, state: str) -> str:
    if measurement is None:
        return ""
    t = measurement[state]
    return f"{t['ratio']:.2f}x ({t['lowest_ratio']:.2f} to {t['highest_ratio']:.2f})"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
