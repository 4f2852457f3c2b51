"""Closed streams, readers that leave and full disks do not stop a command or damage its files."""

import subprocess
import sys
from pathlib import Path

import pytest

from base.command_line import run_script
from base.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import logging, sys
sys.path.insert(0, {root!r})
from base.streams import forgiving_streams

with forgiving_streams() as streams:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO)
    with open("kept", "w") as file:
        for number in range(2000):
            logging.info("line %d of many that fill a pipe", number)
            print("printed", number)
            print("said", number, file=sys.stderr)
            file.write("x")
    sys.stdout.flush()
    code = 1 if streams.problem() else 0
sys.exit(code)
"""


def shell(folder, line):
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = line.format(f"{sys.executable} script.py")
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert (folder / "kept").read_text() == "x" * 2000, done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "code", "last"),
    [
        ("{} >&- 2>err", 0, "said 1999"),
        ("{} <&- >&- 2>&-", 0, None),
        ("{} 2>&- >/dev/null", 0, None),
        ("set -o pipefail; {} 2>err | head -n 1", 1, "said 1999"),
        ("set -o pipefail; {} 2>&1 >/dev/null | head -n 1", 0, None),
        ("{} >/dev/full 2>err", 1, "said 1999"),
        ("{} 2>/dev/full >/dev/null", 0, None),
    ],
)
def test_broken_streams_do_not_stop_the_work(tmp_path, line, code, last):
    done = shell(tmp_path, line)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    if last is not None:
        said = (tmp_path / "err").read_text().splitlines()
        assert said[-1] == last
        assert len(said) == 2000


def test_a_full_disk_behind_standard_output_is_one_line(tmp_path, monkeypatch, capfd):
    def main():
        print("x")

    with open("/dev/full", "w") as full, monkeypatch.context() as patched:  # noqa: PTH123
        patched.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run_script(main)
        assert end.value.code == 1
        assert sys.stdout is full, "streams are what they were"
    assert capfd.readouterr() == (
        "",
        "error: standard output: cannot be written: No space left on device\n",
    )


def test_an_error_keeps_its_exit_code_and_is_one_line(monkeypatch, capfd):
    def main():
        raise ConfigError("name\n\x1b[2Jof a file")

    for stream in (None, sys.stdout):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as end:
                run_script(main)
        assert end.value.code == 2
        assert capfd.readouterr() == ("", "error: name\\n\\x1b[2Jof a file\n")


def test_python_itself_is_stopped_by_a_broken_pipe(tmp_path):
    (tmp_path / "kept").write_text("x" * 2000)
    line = f"set -o pipefail; {sys.executable} -c 'for i in range(99999): print(i)' | head -n 1"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
