"""Text of unknown origin is shown as one line in which every character is visible."""

import logging

import pytest

from base.text import LineFormatter, counted, csv_text, describe_error, one_line, say

HOSTILE = {
    "a\nb": r"a\nb",
    "a\r\n": r"a\r\n",
    "\x1b[2J": r"\x1b[2J",
    "\x9b1m": r"\x9b1m",
    "\x7f": r"\x7f",
    "\x00": r"\x00",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066x\u2069": r"\u2066x\u2069",
    "\u2028": r"\u2028",
    "\x85": r"\x85",
    "caf\udce9": r"caf\udce9",
    "a\tb": r"a\tb",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_invisible_characters_are_escaped(text, capsys):
    assert one_line(text) == HOSTILE[text]
    say(text)
    assert capsys.readouterr().out == f"{HOSTILE[text]}\n"
    record = logging.makeLogRecord({"msg": "%s", "args": (text,)})
    assert LineFormatter().format(record) == HOSTILE[text]


@pytest.mark.parametrize("text", ["кот 猫 🙂 naïve", "a|b*_c_ $x$ <b> \"q\" 'p' \\n"])
def test_visible_characters_are_unchanged(text):
    assert one_line(text) == text


def test_no_text_of_a_csv_file_is_a_formula():
    for begin in "=+-@":
        assert csv_text(f"{begin}1+cmd") == f"'{begin}1+cmd"
    assert csv_text("\t=1") == r"\t=1"
    assert csv_text("a=b") == "a=b"


def test_long_values_are_cut_before_they_are_escaped():
    assert one_line("\n" * 10, 3) == r"\n\n\n..."


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (RuntimeError("\n  sizes differ\nat line 3"), "RuntimeError: sizes differ"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_is_its_class_and_its_first_words(error, described):
    assert describe_error(error) == described


def test_one_thing_is_not_named_in_the_plural():
    found = [counted(number, noun) for noun in ("batch", "epoch") for number in (0, 1, 2)]
    assert ", ".join(found) == "0 batches, 1 batch, 2 batches, 0 epochs, 1 epoch, 2 epochs"
