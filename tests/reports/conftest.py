"""Run folders without training: files as a run would write them, from the values of a test."""

import json

import pytest

from base.config import validate
from base.config.strict_json import json_text
from base.config.tree import merge

CONFIG = {
    "name": "made",
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv"}},
    "data_loader": {"type": "DigitsDataLoader"},
    "optimizer": {"type": "SGD", "args": {"lr": 0.1}},
}


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder and return it: `values` are the metrics of every epoch (None: not measured
    in it), `result` what result.json holds (None: not finished); NaN becomes null."""

    def make(name, values, result=None, /, **sections):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(validate(merge(CONFIG, sections)).dump()))
        epochs = range(len(next(iter(values.values()))))
        lines = [
            {key: series[epoch] for key, series in values.items() if series[epoch] is not None}
            for epoch in epochs
        ]
        (folder / "metrics.jsonl").write_text(
            "".join(
                json_text({"epoch": epoch, **line}) + "\n"
                for epoch, line in enumerate(lines, start=1)
            )
        )
        if result is not None:
            (folder / "result.json").write_text(json_text(result))
        return folder

    return make
