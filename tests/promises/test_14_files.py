"""Promise 14, the files.

A mistake in any object of any shipped JSON file is one line, with line and column where `json`
knows them. A mistake in any setting of any grid is one line that names the setting. `train.py` ends
with exit code 2 and one line before it has written anything.
"""

import json
import re

import pytest
from shipped_configs import CONFIGS, FILES, GRIDS, ROOT, Loading

from base.config import problems, strict_json
from studies import grid
from tiny_runs import python


def check_grids(load):
    """Every setting of every grid, misspelt and of wrong types, and the grid's own keys: the line
    names them."""
    for path in GRIDS:
        tree = {
            key: value for key, value in json.loads(path.read_text()).items() if key[0] not in "_$"
        }
        if "base" in tree:
            tree["base"] = str((path.parent / tree["base"]).resolve())
        for name, value in tree.get("variants", {}).items():
            tree["variants"][name] = (
                str((path.parent / value).resolve()) if isinstance(value, str) else value
            )
        for key in tree:
            load.refuses_grid(
                {**tree, key + key[-1]: tree[key]}, f"{key}{key[-1]}: ", f"did you mean {key!r}?"
            )
            load.refuses_grid({**tree, key: 3}, f"{key}: ")
            load.refuses_grid({**tree, key: [["a"]]}, f"{key}")
        for label, settings in labeled_settings(tree):
            for key in settings:
                others = {other: settings[other] for other in settings if other != key}
                for wrong in (
                    {key + key[-1]: settings[key]},
                    {key: {"a": 1}},
                    {key: [["a"]]},
                    {"comet.api": "secret"},
                ):
                    alone = {"base": tree["base"], "variants": {label: {**others, **wrong}}}
                    load.refuses_grid(alone, f"{next(iter(wrong))}: ")


def labeled_settings(tree):
    """Label and settings of every axis and variant of a grid; those variants that are config files
    have none of their own."""
    for labels in (*tree.get("axes", {}).values(), tree.get("variants", {})):
        yield from (
            (label, settings) for label, settings in labels.items() if isinstance(settings, dict)
        )


INSERTED = {
    '"zz" 1, ': (5, "not valid JSON: Expecting ':' delimiter"),
    '"z\udcff": 1, ': (2, "byte 0xff is not UTF-8 text"),
    '"zz": 1, "zz": 2, ': (None, "key 'zz' is given twice in one object"),
    '"zz": NaN, ': (None, "NaN is not a finite number"),
    '"zz": -1e999, ': (None, "-1e999 is too large a number"),
    '"z\\ud800": 1, ': (None, "half a surrogate pair is not text"),
    f'"zz": {"[" * 10_000}': (None, "nested deeper than 100 levels"),
}
"""Text that is put after the opening brace of an object -> the offset of the mistake in it (None
where the message names no line and column), and the reason."""


def check_json(load):
    """Mistakes in every object of every shipped file, with line ends of Unix and of Windows: one
    line that names the file and, where `json` knows them, the line and column."""
    for file in [*FILES, *GRIDS]:
        text = file.read_text()
        assert load.text(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
        load.refuses_text(text.encode("utf-16"), "line 1, column 1: byte 0xff is not UTF-8 text")
        for brace in re.finditer(r"{(?!\s*})", text):
            before = text[: brace.end()]
            line = before.count("\n") + 1
            for inserted, (offset, reason) in INSERTED.items():
                message = reason
                if offset is not None:
                    column = len(before) - before.rfind("\n") + offset
                    message = f"line {line}, column {column}: {reason}"
                broken = (before + inserted + text[brace.end() :]).encode(errors="surrogateescape")
                load.refuses_text(broken, message)
                load.refuses_text(broken.replace(b"\n", b"\r\n"), message)


CHECKS = {check_grids: 445, check_json: 3066}
"""How many loads each of them tries: more where a config is added, never fewer."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_mistake_in_every_file_is_named(check, tmp_path):
    load = Loading(tmp_path / "config.json")
    check(load)
    assert load.count >= CHECKS[check]


def names_no_key(monkeypatch):
    message = problems._message
    monkeypatch.setattr(problems, "_message", lambda problem: message(problem).partition(": ")[2])


def shows_keys_in_grids(monkeypatch):
    monkeypatch.setattr(grid, "_holds_key", lambda settings: False)


def accepts_repeated_keys(monkeypatch):
    monkeypatch.setattr(strict_json, "_parse_object", dict)


def counts_columns_from_0(monkeypatch):
    class From0(strict_json.JSONError):
        def __init__(self, reason, place="", is_syntax_error=False):
            place = re.sub(r"\d+$", lambda column: str(int(column[0]) - 1), place)
            super().__init__(reason, place, is_syntax_error)

    monkeypatch.setattr(strict_json, "JSONError", From0)


@pytest.mark.parametrize(
    ("check", "break_it"),
    [
        (check_grids, names_no_key),
        (check_grids, shows_keys_in_grids),
        (check_json, accepts_repeated_keys),
        (check_json, counts_columns_from_0),
    ],
)
def test_the_check_can_fail_where_a_safeguard_is_gone(check, break_it, monkeypatch, tmp_path):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(Loading(tmp_path / "config.json"))


CASES = {
    "deleted": ("{}", [], "config.json: data_loader: required, but not given"),
    "misspelt": (
        '{"trainer": {"epocs": 3}}',
        [],
        "trainer.epocs: unknown key; did you mean 'epochs'?",
    ),
    "wrong type": (
        '{"extends": "DIGITS"}',
        ["--set", "system.compile=1"],
        "system.compile: Input should be a valid boolean, not 1",
    ),
    "out of range": (
        '{"extends": "DIGITS"}',
        ["--set", "optimizer.args.lr=-1"],
        "optimizer.args.lr: SGD does not accept -1: Invalid learning rate: -1",
    ),
    "no JSON": (
        '{"seed": 1,\n "seed" 2}',
        [],
        "config.json: line 2, column 9: not valid JSON: Expecting ':' delimiter",
    ),
}
"""Text of a config, more words of the command line, and what the line on stderr says."""


def check_script(folder, text, words, message, before="pass"):
    """train.py ends with exit code 2 and one line on stderr, and writes nothing."""
    (folder / "config.json").write_text(text.replace("DIGITS", str(CONFIGS / "quickstart.json")))
    code = (
        f"import sys, runpy; sys.argv[0] = {str(ROOT / 'train.py')!r};"
        f" sys.path.insert(0, {str(ROOT)!r}); {before};"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = python("-c", code, "-c", "config.json", *words, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("case", CASES)
def test_train_ends_with_one_line_and_writes_nothing(case, tmp_path):
    check_script(tmp_path, *CASES[case])


def test_the_check_can_fail_where_the_exit_code_is_another(tmp_path):
    with pytest.raises(AssertionError):
        check_script(
            tmp_path,
            *CASES["misspelt"],
            before="import base.errors; base.errors.ConfigError.exit_code = 1",
        )
