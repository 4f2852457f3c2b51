"""Outputs are written through links, pipes and devices, and never replace an input file."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from base.errors import ConfigError
from base.output import (
    PICTURES,
    check_outputs,
    format_of,
    is_stream,
    write_output,
)

TABLES = ("md", "tex", "csv")


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def check(path, files=(), folders=(), flag="--json"):
    check_outputs({flag: path}, {"--figure": PICTURES}, files, folders)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "new" / "a.json"
    check(file)
    write_output(file, b"first")
    with file.open("rb") as opened:
        write_output(file, b"second")
        assert opened.read() == b"first", "whoever reads the old file still has it"
    assert file.read_bytes() == b"second"
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_stays_and_its_file_is_written(tmp_path, target_exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "b.json", tmp_path / "link.json"
    if target_exists:
        target.write_text("old")
    (tmp_path / "between").symlink_to("elsewhere/b.json")
    link.symlink_to("between")
    check(link)
    write_output(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()


def test_a_named_pipe_and_a_link_to_it_get_the_bytes(tmp_path):
    fifo, link, read = tmp_path / "fifo", tmp_path / "link", []
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        check(path)
        reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
        reader.start()
        write_output(path, b"x" * 200_000)
        reader.join()
        assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert [len(data) for data in read] == [200_000, 200_000]


def test_devices_are_not_replaced(tmp_path):
    link = tmp_path / "nothing.json"
    link.symlink_to("/dev/null")
    for path in ("/dev/null", link):
        check(path)
        write_output(path, b"x")
        assert is_stream(path)
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_output("/dev/full", b"x")


def test_standard_output_is_written_where_it_stands(tmp_path, pipe):
    file, kept = tmp_path / "log", os.dup(1)
    with file.open("wb", buffering=0) as opened:
        try:
            os.dup2(opened.fileno(), 1)
            for path in ("-", "/dev/stdout"):
                opened.write(b"before ")
                write_output(path, b"report ")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert file.read_bytes() == b"before report before report "
    write_output(f"/dev/fd/{pipe[1]}", b"report")
    assert os.read(pipe[0], 100) == b"report"


def test_a_reader_that_has_left_is_not_an_error(pipe):
    os.close(pipe[0])
    write_output(f"/dev/fd/{pipe[1]}", b"x")


def test_a_descriptor_that_is_closed_is_one_line():
    with pytest.raises(ConfigError, match="^--json /dev/fd/987: cannot be written: [^\\n]*$"):
        check("/dev/fd/987")


def test_formats_of_streams_are_the_first(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("-", "/dev/stdout", tmp_path / "fifo", "/dev/null"):
        assert format_of(path, PICTURES) == "png"
        assert format_of(path, TABLES) == "md"
    assert format_of("a.SVG", PICTURES) == "svg"
    with pytest.raises(
        ConfigError,
        match=r"^a.tsv: '.tsv' is not a format of tables; expected one of: md, tex, csv$",
    ):
        format_of("a.tsv", TABLES)


def test_input_files_are_not_overwritten(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    checkpoint, config = run / "model_best.pth", tmp_path / "config.json"
    checkpoint.write_text("")
    config.write_text("")
    (tmp_path / "link.json").symlink_to(config)
    (tmp_path / "hard.json").hardlink_to(checkpoint)
    (tmp_path / "log.md").symlink_to(run / "metrics.jsonl")
    (tmp_path / "other run").symlink_to(run)
    read = {"files": [checkpoint, config], "folders": [run]}
    for path in (config, tmp_path / "link.json", checkpoint, tmp_path / "hard.json"):
        with pytest.raises(
            ConfigError, match="^--json .*: cannot be written: it is .*, which is being read$"
        ):
            check(path, **read)
    own = ("result.json", "model_epoch_7.pth", "info.log", "labels.npz")
    for path in (
        tmp_path / "log.md",
        tmp_path / "other run" / "config.json",
        *(run / name for name in own),
    ):
        with pytest.raises(
            ConfigError,
            match="cannot be written: it is a file of the run in .*, which is being read$",
        ):
            check(path, **read)
    for path in (run / "spectrum.json", run / "eval" / "a.json", tmp_path / "result.json"):
        check(path, **read)


def test_two_outputs_cannot_be_one_file(tmp_path):
    (tmp_path / "link.png").symlink_to("a.png")
    with pytest.raises(ConfigError, match=r"^--figure .*link.png: --json is written there, too$"):
        check_outputs({"--json": tmp_path / "a.png", "--figure": tmp_path / "link.png"}, {})
    with pytest.raises(ConfigError, match="^--figure /dev/stdout: --json is written there, too$"):
        check_outputs({"--json": "-", "--figure": "/dev/stdout"}, {})
    check_outputs({"--json": "/dev/null", "--figure": "/dev/null"}, {})


def test_messages_leave_standard_output_to_a_report(monkeypatch, capfd):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", sys.stdout)
        check("-")
        print("a message")
        write_output("-", b"{}")
        assert capfd.readouterr() == ("{}", "a message\n")


@pytest.mark.parametrize("name", ["", "a/../..", "x" * 300 + ".json", "file/a.json"])
def test_paths_that_cannot_be_written_are_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^--json .*: cannot be written: [^\n]+$"):
        check(tmp_path / name)
