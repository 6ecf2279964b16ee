"""`python -m kl_kernels.lab.study.prepare DIR`: make the start of all runs of a seed, once."""

from __future__ import annotations

import sys
from pathlib import Path

from kl_kernels.lab.ppo.checkpoint import RunFolder, open_run
from kl_kernels.lab.ppo.command import INTERRUPTED, Inputs, Task, prepare
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.ranks import SINGLE_PROCESS


def is_prepared(folder: RunFolder) -> bool:
    return folder.reward_model.is_file()  # the last thing `prepare` leaves


def load_task(folder: RunFolder, config: PPOConfig) -> Task:
    """The task of a prepared folder."""
    return prepare(config, folder, Inputs(config), SINGLE_PROCESS)


def main() -> int:
    folder, config = open_run(Path(sys.argv[1]))
    try:
        load_task(folder, config)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
