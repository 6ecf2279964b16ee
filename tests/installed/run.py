"""The wheel in an environment of its own, far from the tree: smoke test, tests, types, SBOM.

python tests/installed/run.py [--python PYTHON] [--sbom FILE] WHEEL

PYTHON has what the wheel depends on, and pytest. Nothing is downloaded: the environment gets links
to the dependencies that the wheel's metadata asks for, so that any other is found missing. With
--sbom they are written into FILE (CycloneDX), their licences are checked, and the types.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
# Tests that a bad wheel would fail, without the minutes that the Triton interpreter takes.
SELECTION = (
    "functional/test_arguments",
    "backends/test_cpu_backend",
    "backends/test_stable_abi",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--sbom", type=lambda name: Path(name).resolve())
    parser.add_argument("wheel", type=lambda name: Path(name).resolve())
    args = parser.parse_args()
    source = shutil.which(args.python)
    if source is None:
        parser.error(f"--python is {args.python!r}; there is no such program")
    # Here are many small tensors, which threads only slow down.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str | Path) -> None:
            print("+", *command, flush=True)
            subprocess.run(command, cwd=folder, env=alone, check=True)

        environment = Path(folder) / "environment"
        python = environment / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(source, "-m", "venv", "--without-pip", environment)
        run(*pip, "install", "--quiet", "--no-index", "--no-deps", args.wheel)
        (site,) = environment.glob("lib/python*/site-packages")
        run(source, HERE / "link.py", site)
        run(*pip, "check")
        run(python, "-I", HERE / "smoke.py")
        if args.sbom:
            describe = (
                sys.executable,
                "-m",
                "cyclonedx_py",
                "environment",
                "--output-reproducible",
            )
            project = ("--pyproject", TESTS.parent / "pyproject.toml", "--mc-type", "library")
            run(*describe, *project, "--output-file", args.sbom, python)
            run(sys.executable, HERE / "licences.py", args.sbom)
            # Check that mypy finds the package's types, by py.typed.
            mypy = (sys.executable, "-m", "mypy", "--python-executable", python)
            settings = ("--config-file", TESTS / "typing" / "mypy.ini")
            run(*mypy, *settings, TESTS / "typing" / "public_api.py")

        run(source, TESTS / "trainers" / "overlay.py", environment)  # makes pytest importable
        shutil.copytree(TESTS, Path(folder) / "tests")
        files = [f"tests/{name}.py" for name in SELECTION]
        run(python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)


if __name__ == "__main__":
    main()
