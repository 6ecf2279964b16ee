"""Files that a crash at any moment leaves whole, in folders that other users cannot write to.

The umask decides who may read them, except those named private.

The old content or the new, never a part of it: they are written beside their place, flushed to the
disk and then renamed onto it. Links planted where a file is to be made are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Upper bounds, which the umask may lower. A group can never write, whatever the umask: a run's
# config.json names a module that is imported when the run is resumed.
FOLDER_MODE = 0o755
FILE_MODE = 0o644
PRIVATE_FOLDER_MODE = 0o700
PRIVATE_FILE_MODE = 0o600
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows makes links for administrators only


def make_folder(path: Path, mode: int = FOLDER_MODE) -> None:
    """Make `path` and what is missing above it. What is there stays as it is."""
    if "\0" in str(path):
        raise OSError("its name holds a NUL")
    # mkdir(parents=True) would leave the folders above to the umask, and whoever can write to one
    # of those can put another folder in this one's place.
    if not path.parent.exists():
        make_folder(path.parent)
    path.mkdir(mode=mode, exist_ok=True)


def opener(path: str, flags: int) -> int:
    """Open a file for `open`: a new one is writable by this user alone, and a link is refused."""
    return os.open(path, flags | _NO_FOLLOW, FILE_MODE)


def private_opener(path: str, flags: int) -> int:
    """Open a file as `opener` does, but make a new one private to this user.

    Locks need this: a user who can open a lock, if only to read, can hold it for ever.
    """
    return os.open(path, flags | _NO_FOLLOW, PRIVATE_FILE_MODE)


def check_links(name: str, folder: Path) -> None:
    """Refuse a folder with links that lead out of it.

    Raises:
        ValueError: something in it is a link that leads out of it; `name` is the argument's.
    """
    root = Path(os.path.realpath(folder))
    for path in folder.rglob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            raise ValueError(
                f"{name} is '{folder}', in which '{path.relative_to(folder)}' is a link that leads "
                "out of it; a run is continued in a folder that holds all of it"
            )


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` with a binary file that becomes `path` only once it is complete on disk."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # left by a crash
    with open(partial, "xb", opener=opener) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders, and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
