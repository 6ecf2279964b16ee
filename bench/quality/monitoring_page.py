"""Sections of docs/monitoring.md: false alarms of `KLMonitor`, and how soon it finds a mistake."""

from __future__ import annotations

from typing import Any


def noise_and_changes(results: dict[str, Any]) -> str:
    """False alarms of the monitor's defaults, and how soon they find a change."""
    lines = [
        f"| {results['steps']} steps of noise | phi | false alarms per run | of which |",
        "|---|---|---|---|",
    ]
    for f in results["false_alarms"]:
        kinds = ", ".join(f"`{kind}` {rate:.4f}" for kind, rate in f["kinds"].items())
        lines.append(f"| {f['name']} | {f['phi']} | {f['rate']:.3f} ± {f['error']:.3f} | {kinds} |")
    lines += [
        "\n| lasting change, phi 0.6 | after | at that step | within 5 | within 10 | within 14 "
        "| within 20 | median delay |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in results["found"]:
        cells = " | ".join(
            f"{p:.1%} ± {f['error'][d]:.1%}" if d == "14" else f"{p:.1%}"
            for d, p in f["within"].items()
        )
        delay = f"{f['median_delay'] - 1:.0f}"
        lines.append(f"| {f['name']} | {f['change_at']} steps | {cells} | {delay} |")
    longest = max(f["steps_after"] for f in results["found"])
    echoes = ", ".join(
        f"{f['alarms_after']:.2f} ({f['name']})"
        for f in results["found"]
        if f["steps_after"] == longest
    )
    known, n = results["known_parameters"], [f["runs"] for f in results["found"]]
    lines.append(
        f"\nOne change raises, in the {longest} steps from it on, this many alarms: {echoes}. "
        "A CUSUM that is told level, phi, sd and size of the change, and gives as many false "
        f"alarms as `kl_drift` ({known['false_alarm_rate']:.3f}), finds the last of these changes "
        f"within 14 steps in {known['within_14']:.1%} ± {known['error']:.1%} of runs: no monitor "
        "can do much better than that. Within counts the step of the change as the first. Runs: "
        f"{', '.join(str(f['runs']) for f in results['false_alarms'])} of noise, of levels 0, 1, 5 "
        f"and 20 and sd 0.01, 0.1 and 1 in turn; {min(n)} per change; ± is one standard error; "
        f"commit {results['commit']}. From `bench/results/monitor.json`, made by "
        "`make bench-monitor`."
    )
    return "\n".join(lines)


def sampling_gap(results: dict[str, Any]) -> str:
    """Gaps of mistakes, how many batches show them, and false alarms."""
    sizes = list(results["found"][0]["found"])
    found_in = " | ".join(f"one batch of {int(n):,} tokens finds" for n in sizes)
    lines = [
        f"| mistake | gap, nats | {found_in} | batches of 2,048 until told |",
        "|---|---|" + "---|" * (len(sizes) + 1),
    ]
    for f in results["found"]:
        shares = " | ".join(f"{f['found'][n]:.0%}" for n in sizes)
        batches = f["median_batches"]
        wait = "over 100" if batches is None else f"{batches:.0f}"
        lines.append(f"| {f['mistake']} | {f['gap']:+.3f} ± {f['error']:.3f} | {shares} | {wait} |")
    steps, worst, rare = results["steps"], results["worst"], results["worst_runs"]
    right = "; ".join(
        f"{f['alarms']} alarms in {f['runs']} runs of {steps} batches of {f['tokens']:,} tokens"
        for f in results["false_alarms"]
    )
    lines.append(
        f"\nFalse alarms where nothing is wrong: {right}. The worst distributions found, one "
        "likely token and the rest spread over 150,000: by enumeration over sizes of a batch and "
        f"over the share of the rest, at most {worst['probability']:.1e} per batch (at a share of "
        f"{worst['eps']:.3f} and {worst['tokens']:,} tokens), and there {rare['alarms']} alarms in "
        f"{rare['runs']:,} runs of {steps} batches. The language: the next of {results['letters']} "
        f"letters after three, of English text, with an entropy of {results['entropy']:.2f} nats; "
        f"answers of 20 or 32 letters; the last column is a median. Commit {results['commit']}. "
        "From `bench/results/sampling_gap.json`, made by `make bench-monitor`."
    )
    return "\n".join(lines)
