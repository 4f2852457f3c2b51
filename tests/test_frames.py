"""The number of frames and files from a command to one optimizer step."""

import json
import traceback
from pathlib import Path

import pytest
import torch

from base.config.tree import merge
from tiny_runs import ROOT, TINY, script

pytestmark = pytest.mark.usefixtures("only_few_digits")

MOST_FRAMES, MOST_FILES = 9, 5


@pytest.mark.parametrize(
    ("name", "method"),
    [("train.py", "none"), ("train_robust.py", "trades"), ("train_robust.py", "free")],
)
def test_the_path_from_a_script_to_an_optimizer_step_is_short(tmp_path, name, method):
    (tmp_path / "config.json").write_text(
        json.dumps(merge(TINY, {"adversarial": {"method": method}}))
    )

    def look():
        unwatched = torch.optim.SGD.step

        def step(self, closure=None):
            stack = traceback.extract_stack()[:-1]
            if not any(frame.name == "update" for frame in stack):
                # A config's optimizer is tried on a number first
                return unwatched(self, closure)
            files = [Path(frame.filename) for frame in stack]
            own = [str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT)]
            (tmp_path / "frames.json").write_text(json.dumps(own[own.index(name) :]))
            raise ZeroDivisionError

        torch.optim.SGD.step = step

    done = script(
        name,
        "-c",
        tmp_path / "config.json",
        "--run_dir",
        tmp_path / "run",
        cwd=tmp_path,
        before=look,
    )
    assert done.returncode != 0
    frames = json.loads((tmp_path / "frames.json").read_text())
    assert frames[0] == name
    assert frames[-1] == "base/base_trainer.py", "the step stands in BaseTrainer.update"
    assert len(frames) <= MOST_FRAMES
    assert len(set(frames)) <= MOST_FILES
