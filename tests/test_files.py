"""A file is the old one or the new one, whatever happens while it is written."""

import os

import pytest

from kl_kernels import files
from kl_kernels.files import write_atomically, write_text


class Crash(Exception):
    pass


def test_a_crash_while_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_text(path, "whole")

    def half(file):
        file.write(b"half of wh")
        raise Crash

    with pytest.raises(Crash):
        write_atomically(path, half)
    assert path.read_text() == "whole"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_text(path, "first")

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, crash)
        with pytest.raises(Crash):
            write_text(path, "second")
    assert path.read_text() == "first"
    write_text(path, "third")
    assert path.read_text() == "third"


def test_content_reaches_the_disk_before_the_name_and_the_name_before_returning(
    tmp_path, monkeypatch
):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "file", "")
    folder_can_be_flushed = os.name != "nt"
    assert order == ["fsync", "rename", "fsync"][: 2 + folder_can_be_flushed]
