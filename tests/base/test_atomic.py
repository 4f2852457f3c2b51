"""Files that are replaced atomically, on file systems that lack something."""

import errno
import os
import stat

import pytest

from base.atomic import replacing


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
