"""The study index keeps every entry, whoever else writes it."""

import json
from multiprocessing import get_context

import pytest

from base.errors import ConfigError
from base.run_folder import study_index
from base.run_folder.study_index import StudyEntry, read_study_index, write_study_index

ENTRY = StudyEntry("bn", 0, {"norm": "BatchNorm"})


def add_entries(folder, writer):
    for number in range(20):
        write_study_index(folder, {f"{writer}_{number}": ENTRY})


def test_processes_that_write_at_the_same_time_lose_no_entry(tmp_path):
    writers = [get_context("fork").Process(target=add_entries, args=(tmp_path, n)) for n in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert read_study_index(tmp_path) == {
        f"{name}_{number}": ENTRY for name in "abc" for number in range(20)
    }
    assert {file.name for file in tmp_path.iterdir()} == {".study.lock", "study.json"}


def test_an_index_that_has_every_entry_is_left_alone(tmp_path, monkeypatch):
    write_study_index(tmp_path, {"a": ENTRY})
    monkeypatch.setattr(study_index, "replace_json", lambda *_: pytest.fail("written again"))
    write_study_index(tmp_path, {"a": ENTRY})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"a": {"variant": "bn", "position": 0, "labels": None}}),
        json.dumps({"a": {"variant": "bn", "position": "0", "labels": {}}}),
        json.dumps({"a": {"variant": "bn", "position": 0, "labels": {"norm": 1}}}),
        json.dumps({"a": {"variant": "bn"}}),
    ],
)
def test_a_damaged_index_is_no_index_to_readers_and_an_error_to_writers(tmp_path, content):
    file = tmp_path / "study.json"
    file.write_text(content)
    assert read_study_index(tmp_path) == {}
    with pytest.raises(ConfigError, match=r"study\.json: is not a study index \(.*; repair or rem"):
        write_study_index(tmp_path, {"b": ENTRY})
    assert file.read_text() == content


def test_an_index_that_cannot_be_read_is_not_overwritten(tmp_path, monkeypatch):
    write_study_index(tmp_path, {"a": ENTRY})
    before = (tmp_path / "study.json").read_text()

    def fail(file):
        raise OSError("stale file handle")

    monkeypatch.setattr(study_index, "_read", fail)
    with pytest.raises(OSError, match="stale"):
        write_study_index(tmp_path, {"b": ENTRY})
    assert (tmp_path / "study.json").read_text() == before
