"""Puts the packages of the Python that runs this behind those of another virtual environment.

python tests/trainers/overlay.py ENVIRONMENT
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

ASK = "import sysconfig; print(sysconfig.get_path('purelib'))"


def main() -> None:
    python = Path(sys.argv[1]) / "bin" / "python"
    asked = subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True)
    # addsitedir and not a bare path: it follows .pth files, such as that of an editable install.
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(asked.stdout.strip()) / "behind.pth").write_text(line)


if __name__ == "__main__":
    main()
