"""The examples of docs/extending.md, run as a user would: copied out of the clone, by the commands
that the page gives."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tiny_runs import python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
WITH_COMMANDS = [title for title, section in SECTIONS.items() if "```bash" in section]
NOT_WRITTEN_BY_COMMANDS = {".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def blocks(section, language):
    return [
        block.strip("\n") for block in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    ]


def files_of_the_clone():
    found = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_WRITTEN_BY_COMMANDS]
        for name in names:
            file = Path(folder, name)
            found[file] = file.stat().st_mtime_ns
    return found


def run(command, folder):
    """Return what a command of the page prints.

    It runs in a fork of this process, which has the imports done.
    """
    words = shlex.split(command.replace("$CLONE", str(ROOT)))
    environment = dict(os.environ)
    if words[0].startswith("PYTHONPATH="):
        key, _, environment[key] = words.pop(0).partition("=")
    assert words[0] == "python"
    done = python(*words[1:], cwd=folder, env=environment)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout + done.stderr


def is_shown_as(line, shown):
    """Return whether a line is what the page shows, except for its numbers and for the places of
    three dots."""
    parts = [NUMBER.sub("\0", part) for part in shown.split("...")]
    pattern = ".*".join(re.escape(part).replace("\0", NUMBER.pattern) for part in parts)
    return re.fullmatch(pattern, line) is not None


@pytest.mark.parametrize("title", WITH_COMMANDS)
def test_an_example_does_what_the_page_shows(title, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(ROOT / "examples", folder)
    before = files_of_the_clone()
    section = SECTIONS[title]
    printed = [
        run(line, folder) for block in blocks(section, "bash") for line in block.splitlines()
    ]
    lines = "".join(printed).splitlines()
    for block in blocks(section, "text"):
        for shown in block.splitlines():
            assert any(is_shown_as(line, shown) for line in lines), f"{shown!r} is not in: {lines}"
    assert files_of_the_clone() == before, "nothing is written below the clone"


def test_every_example_is_on_the_page_and_the_page_quotes_its_configs():
    for file in (ROOT / "examples").iterdir():
        if file.suffix in (".py", ".json"):
            assert file.name in PAGE, file.name
    for section in SECTIONS.values():
        names = re.findall(r"-c (\w+\.json)", section)
        for block in blocks(section, "json"):
            config = (ROOT / "examples" / names[0]).read_text()
            for value in re.findall(r'"\w+": (?:"[^"]*"|[\d.]+|\["\w+\.py"\])', block):
                assert value in config, f"{names[0]} does not say {value}"
