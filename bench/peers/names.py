"""Prints the names of the benchmarks: `python -m kl_kernels bench --list`."""

from __future__ import annotations

import argparse
import sys

from bench.peers.compare import benchmarks, name_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="of all sizes")
    parser.add_argument("--only", default="", help="those that contain this text")
    args = parser.parse_args()
    for case, contender in benchmarks(args.full, args.only):
        print(name_of(str(case), contender.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
