"""README's installation to the letter, in a clone and outside of it: kernels run, no warning.

python tests/installed/clone.py

The clone is of the last commit. Nothing is downloaded: in the place of README's first line the
environments get links to what the build and the package need, from the Python that runs this.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIRST = 'pip install "setuptools>=77" wheel torch'
PROGRAM = """
import torch
import kl_kernels

logits, ids = torch.randn(2, 3, 1031), torch.zeros(2, 3, dtype=torch.long)
kl_kernels.token_kl(logits, logits, ids)
kl_kernels.token_kl(logits, logits, ids, backend="cpu")
print(kl_kernels.__file__)
"""


def commands(readme: str) -> list[str]:
    """The commands of README's part about installation, without their comments."""
    section = readme.partition("[start:install] -->")[2].partition("[end:install]")[0]
    block = section.partition("```sh\n")[2].partition("```")[0]
    return [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]


def main() -> None:
    first, install = commands((ROOT / "README.md").read_text())
    if first != FIRST or shlex.split(install)[-2:] != ["-e", "."]:
        sys.exit(f"README.md installs by {first!r} and {install!r}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = folder / "clone"
        run(ROOT, "git", "clone", "--quiet", ROOT, clone)
        # An installation is for Python started elsewhere, an editable one for anywhere.
        for kind, target, places in (
            ("installed", [str(clone)], [folder]),
            ("editable", ["-e", "."], [clone, clone / "docs", folder]),
        ):
            python = environment(folder / kind)
            pip = [sys.executable, "-m", "pip", "--python", python]
            options = ["--quiet", "--no-deps", "--no-index"]
            run(clone, *pip, *shlex.split(install)[1:-2], *options, *target)
            for place in places:
                run(place, python, "-W", "error::UserWarning", "-c", PROGRAM)
                run(place, python, "-m", "kl_kernels", "ppo", "--help")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment that has what the build and the package need."""
    run(ROOT, sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    needed = [name for name in requires("kl_kernels") or () if "extra ==" not in name]
    run(ROOT, sys.executable, HERE / "link.py", site, "setuptools", "wheel", *needed)
    return folder / "bin" / "python"


def run(place: Path, *command: str | Path) -> None:
    print("+", *command, flush=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=place, env=alone | {"OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
