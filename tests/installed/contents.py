"""Check the files of the sdist and of the wheel: every file that belongs there, and no other.

python tests/installed/contents.py FOLDER
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

GENERATED = ("PKG-INFO", "setup.cfg", "kl_kernels.egg-info/")
INFO = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
VERSION = r"\d+(\.\d+)*([a-z]+\d+)?(\+cu\d+)?"


def main() -> None:
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    if not re.fullmatch(rf"kl_kernels-{VERSION}-cp310-abi3-manylinux_\w+\.whl", wheel.name):
        sys.exit(f"{wheel.name}: not a wheel of Python 3.10's stable ABI for any Linux")
    sources = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    sources = {name for name in sources if name and Path(name).exists()}

    with tarfile.open(sdist) as archive:
        files = (member.name for member in archive if member.isfile())
        found = {name.split("/", 1)[1] for name in files}
    found -= {name for name in found if name.startswith(GENERATED)}
    compare(sdist, found, {name for name in sources if not name.startswith(".")} | {"MANIFEST.in"})

    libraries = {"kl_kernels/_C_cpu.abi3.so"}
    # A wheel without the cuda backend holds the reason, which `python -m kl_kernels info` shows.
    cuda = "+cu" in wheel.name
    libraries.add("kl_kernels/_C_cuda." + ("abi3.so" if cuda else "unavailable"))
    with zipfile.ZipFile(wheel) as archive:
        files = [member.filename for member in archive.infolist() if not member.is_dir()]
    found = {re.sub(rf"^kl_kernels-{VERSION}\.dist-info/", "", name) for name in files}
    package = {name for name in sources if name.startswith("kl_kernels/")}
    compare(wheel, found, package | libraries | INFO)


def compare(path: Path, found: set[str], expected: set[str]) -> None:
    """Exit unless the two are the same."""
    if missing := sorted(expected - found):
        sys.exit(f"{path.name} lacks {', '.join(missing)}")
    if surplus := sorted(found - expected):
        sys.exit(f"{path.name} has {', '.join(surplus)}, which it should not have")
    print(f"{path.name}: {len(found)} files, {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
