"""Runs mutmut's mutants in forks of one pytest that has collected its tests.

mutmut itself starts pytest for every mutant, and collecting a thousand tests takes longer than most
mutants live. Mutants, the tests that reach each and the meaning of exit codes are mutmut's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import deque
from fnmatch import fnmatch
from pathlib import Path

import pytest
from mutmut.configuration import config
from mutmut.mutation.trampoline import set_mutant_under_test

SURVIVED, KILLED, NO_TESTS = 0, 1, 33


class Mutants:
    """A plugin: instead of its tests, the session runs those of each mutant until one fails."""

    def __init__(self, names: list[str], children: int) -> None:
        self.names = names
        self.children = children

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # Modules that fixtures would otherwise import in every fork.
        import torch._inductor  # noqa: F401
        import triton.runtime.interpreter  # noqa: F401

        import kl_kernels.backends.triton.launch  # noqa: F401

        stats = json.loads(Path("mutmut-stats.json").read_text())
        reached, duration = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        items = {item.nodeid: item for item in session.items}
        if clean := os.fork():
            if os.wait()[1] != 0:
                raise pytest.UsageError(f"without a mutant, all tests must pass (child {clean})")
        else:
            run("", session.items, 3600)
        running: dict[int, tuple[Path, str]] = {}
        waiting = deque(
            (meta, name)
            for meta in sorted(Path().rglob("*.py.meta"))
            for name, code in json.loads(meta.read_text())["exit_code_by_key"].items()
            if code is None and any(fnmatch(name, pattern) for pattern in self.names)
        )
        print(f"{len(waiting)} mutants", flush=True)
        while waiting or running:
            if waiting and len(running) < self.children:
                meta, name = waiting.popleft()
                tests = reached.get(name.partition("__mutmut_")[0], ())
                tests = sorted(set(tests) & set(items), key=lambda t: duration.get(t, 0.0))
                if not tests:
                    write(meta, name, NO_TESTS)
                    continue
                limit = 15 + 15 * sum(duration.get(test, 1.0) for test in tests)
                child = os.fork()
                if child == 0:
                    run(name, [items[test] for test in tests], int(limit))
                running[child] = meta, name
                continue
            child, status = os.wait()
            write(*running.pop(child), os.waitstatus_to_exitcode(status))
        return True


def write(meta: Path, name: str, code: int) -> None:
    found = json.loads(meta.read_text())
    found["exit_code_by_key"][name] = code
    meta.write_text(json.dumps(found, indent=4))
    print(code, name, flush=True)


def run(name: str, items: list[pytest.Item], limit: int) -> None:
    """Ends the process. SIGXCPU does, too: the code of a mutant that took too long."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    set_mutant_under_test(name)
    code = SURVIVED
    try:
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if item.session.testsfailed:
                code = KILLED
                break
    except BaseException:
        code = KILLED
    os._exit(code)


def main(names: list[str], children: int) -> None:
    """Run the mutants, from the folder that holds mutmut's."""
    options = config()
    os.chdir("mutants")
    set_mutant_under_test("")
    arguments = options.pytest_add_cli_args + options.pytest_add_cli_args_test_selection
    pytest.main(
        [*arguments, "-q", "-s", "--tb=native", "--rootdir=."], plugins=[Mutants(names, children)]
    )


if __name__ == "__main__":
    main(sys.argv[2:] or ["*"], int(sys.argv[1]))
