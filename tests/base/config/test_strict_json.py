"""Everything that this project writes as JSON is valid JSON: non-finite numbers become null."""

import json

import numpy as np
import pytest

from base.config.strict_json import json_text, parse_json
from base.output import replace_json
from base.run_folder.study_index import StudyEntry, write_study_index
from base.tracking.tracker import RunLog

VALUES = {
    "loss": float("nan"),
    "deep": [1.5, (float("inf"), {"low": -float("inf"), "n": 3})],
    "numpy": np.float64("nan"),
    "other": [True, None, "NaN", 1e300],
}
WRITTEN = {
    "loss": None,
    "deep": [1.5, [None, {"low": None, "n": 3}]],
    "numpy": None,
    "other": [True, None, "NaN", 1e300],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_non_finite_numbers_become_null(indent):
    assert parse_json(json_text(VALUES, indent)) == WRITTEN
    finite = {"a": [0.1, 1e-300, -3], "b": {"c": ""}}
    assert json_text(finite, indent) == json.dumps(finite, indent=indent)


def test_every_file_that_a_run_writes_holds_null(tmp_path):
    replace_json(tmp_path / "result.json", VALUES)
    log = RunLog(tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": float("nan")}])
    log.log_epoch({"epoch": 2, "loss": float("-inf"), "top1": 0.25})
    write_study_index(tmp_path, {"run": StudyEntry("a", 0, {"seed": "1"})})
    assert parse_json((tmp_path / "result.json").read_text()) == WRITTEN
    lines = [parse_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": None, "top1": 0.25}]
