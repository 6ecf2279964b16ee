"""Runs fuzzed calls in a process of its own, so that a crash is one more finding.

python tests/fuzz/run.py --calls 100000          (make fuzz)
python tests/fuzz/run.py --seed 1234 --calls 1   one call, again
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HANGS = 300  # seconds without progress: enough to import torch on a busy machine


def work(seed: int, end: int, at: Path) -> None:
    """Calls seed ... end - 1; what is being called is always in the file `at`."""
    import torch
    from fuzz_verdict import verdict

    torch.set_num_threads(1)
    with at.open("w") as file:
        for s in range(seed, end):
            file.seek(0)
            file.write(f"{s:12}")
            file.flush()
            if wrong := verdict(s):
                print(f"seed {s}: {wrong}\n", flush=True)
        file.seek(0)
        file.write(f"{end:12}")


def fuzz(seed: int, calls: int, *, progress: bool = False) -> list[str]:
    """Findings of calls seed ... seed + calls - 1, each with its seed in front."""
    end, findings = seed + calls, []
    with tempfile.TemporaryDirectory() as folder:
        at, output = Path(folder) / "at", Path(folder) / "output"
        while seed < end:
            at.write_text(f"{seed:12}")
            command = [sys.executable, __file__, "--seed", str(seed), "--calls", str(end - seed)]
            with output.open("w") as file:
                worker = subprocess.Popen(
                    [*command, "--worker", str(at)], stdout=file, stderr=subprocess.STDOUT
                )
            hangs = _wait(worker, at, end, progress)
            text = output.read_text()
            findings += ["seed " + part.strip() for part in ("\n" + text).split("\nseed ")[1:]]
            seed = int(at.read_text() or seed)
            if seed < end:
                how = "hangs" if hangs else f"ends the process with {worker.returncode}"
                findings.append(f"seed {seed}: {how}\n{text[-2000:]}")
                seed += 1
    return findings


def _wait(worker: subprocess.Popen, at: Path, end: int, progress: bool) -> bool:
    """Wait until the worker is done; return whether it was killed."""
    before, since, shown = "", time.monotonic(), time.monotonic()
    while True:
        try:
            worker.wait(timeout=0.2)
            return False
        except subprocess.TimeoutExpired:
            now, text = time.monotonic(), at.read_text()
        if text != before:
            before, since = text, now
        elif now - since > HANGS:
            worker.kill()
            worker.wait()
            return True
        if progress and now - shown > 5:
            shown = now
            print(f"at {text.strip()} of {end}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.seed, args.seed + args.calls, args.worker)
        return 0
    findings = fuzz(args.seed, args.calls, progress=True)
    kinds = Counter(finding.split(": ", 1)[-1].split("\n")[0][:120] for finding in findings)
    for finding in findings:
        seed = finding.split()[1].rstrip(":")
        print(f"{finding}\n    again: python tests/fuzz/run.py --seed {seed} --calls 1\n")
    for kind, n in kinds.most_common():
        print(f"{n:6} {kind}")
    print(f"{args.calls} calls from seed {args.seed}: {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
