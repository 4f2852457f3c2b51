"""`docs/PROMISES.md` names every test of a promise, and no test that does not exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "PROMISES.md").read_text().partition("## Do others promise it")[0]


def test_the_table_names_exactly_the_existing_tests():
    named = set(re.findall(r"`(test_\d\d_\w+\.py)`", TABLE))
    assert named == {file.name for file in Path(__file__).parent.glob("test_[0-9][0-9]_*.py")} - {
        Path(__file__).name
    }
    others = re.findall(r"`(tests/(?:\w+/)*\w+\.py)`", TABLE)
    assert others
    assert all((ROOT / name).is_file() for name in others)


def test_every_promise_has_a_test_that_its_check_can_fail():
    for file in Path(__file__).parent.glob("test_[0-9][0-9]_*.py"):
        if file.name != Path(__file__).name:
            assert re.search(r"def test_the_checks?_\w*can_fail", file.read_text()), file.name
    assert re.findall(r"^\| (\d+) \|", TABLE, re.MULTILINE) == [
        str(number) for number in range(1, 16)
    ]
