"""Files that are replaced atomically, on file systems that lack something."""

import errno
import os
import stat
from pathlib import Path

import pytest

from base.atomic import link_or_copy, replacing


def refuse_to_flush_folders(monkeypatch, number):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_a_folder_is_used_as_it_is(tmp_path, monkeypatch, number):
    refuse_to_flush_folders(monkeypatch, number)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    refuse_to_flush_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), replacing(tmp_path / "file") as file:
        file.write(b"new")


def test_the_contents_reach_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    """Without this order a power failure can leave an empty file under the name of a good one."""
    done = []
    flush, rename = os.fsync, Path.replace

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append(("flush", "folder" if is_folder else os.pread(descriptor, 9, 0)))
        flush(descriptor)

    def replace(path, target):
        done.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert done == [("flush", b"new"), ("rename", "file"), ("flush", "folder")]
    done.clear()
    link_or_copy(tmp_path / "file", tmp_path / "other")
    assert done == [("rename", "other"), ("flush", "folder")]


def test_a_name_that_is_given_twice_leaves_no_other_file(tmp_path):
    (tmp_path / "file").write_bytes(b"new")
    for _ in range(2):
        link_or_copy(tmp_path / "file", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
