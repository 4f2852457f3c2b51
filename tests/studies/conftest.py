"""A run of a study, as its grid would plan it."""

from pathlib import Path

import pytest

from base.config import validate
from studies.grid import StudyRun


@pytest.fixture
def run(tmp_path):
    config = validate({"data_loader": {"type": "DigitsDataLoader"}, "trainer": {"epochs": 4}})
    return StudyRun(
        variant="plain",
        labels={},
        position=0,
        seed=1,
        config_file=Path("config.json"),
        settings={},
        config=config,
        folder=tmp_path,
    )
