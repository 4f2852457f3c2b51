"""Short versions of the endurance test and of the fuzzer; both find what is broken."""

import json
from random import Random

import pytest
from torch.optim import Optimizer

import base.base_trainer
import base.checkpoint.checkpoint
import base.checkpoint.resume
from base.base_trainer import BaseTrainer
from tests.soak import targets
from tests.soak.endurance import Endurance, Tally
from tests.soak.mutations import mutated
from tests.soak.scenarios import SCENARIOS, SMALL, tree_of, write_images
from tests.soak.targets import TARGETS, examine, resumable, write_corrupted_checkpoint

PLATEAU = "standard, label noise, early stop, plateau"
MUTATIONS, CORRUPTED = 200, 100


@pytest.fixture
def endure(tmp_path, monkeypatch):
    """A function that makes runs of four epochs until the tally suffices, and returns it."""
    monkeypatch.setitem(SMALL["trainer"], "epochs", 4)
    write_images(tmp_path / "images")

    def until(enough):
        tally = Tally()
        endurance = Endurance(PLATEAU, tmp_path / "soak", tmp_path / "images", Random(4), tally)
        while not enough(tally):
            endurance.run()
        return tally

    return until


def test_a_run_survives(endure):
    saved = "saved at the step of the signal"
    tally = endure(lambda tally: tally.counts[saved] or tally.failures or tally.counts["runs"] >= 8)
    assert tally.failures == []
    assert tally.counts[saved] > 0
    assert tally.counts["minibatches"] == 36 * tally.counts["runs"]


def test_a_lost_state_is_found(endure, monkeypatch):
    # The momentum is lost at every resume
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, state: None)
    tally = endure(lambda tally: tally.failures or tally.counts["runs"] > 8)
    assert any("differs from the undisturbed run" in failure for failure in tally.failures)


def test_scenarios_are_complete_configs():
    for name in SCENARIOS:
        assert json.loads(json.dumps(tree_of(name, "x")))["arch"]["type"] in (
            "simpleCNN",
            "wide_resnet",
        )
    assert "data_dir" not in SMALL["data_loader"]["args"]


def fuzz(target, folder):
    """Return the numbers of refused and of accepted files."""
    random, file, counts = Random(0), folder / "input", [0, 0]
    seeds = TARGETS[target][1]()
    for seed in seeds:
        file.write_bytes(seed)
        examine(target, file)
    for _ in range(MUTATIONS):
        file.write_bytes(mutated(random.choice(seeds), random))
        counts[examine(target, file)] += 1
    return counts


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_are_accepted_or_refused_in_one_line(tmp_path, target):
    refused, _ = fuzz(target, tmp_path)
    assert refused > MUTATIONS / 4


def resume_corrupted_checkpoints(folder):
    """Return the numbers of refused and of resumed checkpoints with one corrupted value."""
    random, file, counts = Random(7), folder / "input", [0, 0]
    for _ in range(CORRUPTED):
        write_corrupted_checkpoint(file, random)
        counts[examine("checkpoint", file)] += 1
    return counts


def test_corrupted_values_are_refused_or_harmless(tmp_path):
    refused, good = resume_corrupted_checkpoints(tmp_path)
    assert refused > CORRUPTED / 2
    assert good > 0


def test_a_corrupted_value_that_is_not_checked_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(base.checkpoint.resume, "check_training_state", lambda contents, file: None)
    monkeypatch.setattr(
        base.base_trainer, "checked_optimizer_state", lambda optimizer, model, saved, source: saved
    )
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError, RuntimeError)):
        resume_corrupted_checkpoints(tmp_path)


def test_every_seed_is_resumed_for_a_step(tmp_path, monkeypatch):
    steps, update = [], BaseTrainer.update

    def counted(self, loss):
        steps.append(self.state.batches_done)
        update(self, loss)

    monkeypatch.setattr(BaseTrainer, "update", counted)
    seeds = TARGETS["checkpoint"][1]()
    for seed in seeds:
        (tmp_path / "input").write_bytes(seed)
        assert examine("checkpoint", tmp_path / "input")
    assert steps == [resumable()["batch"]] * len(seeds)


def test_the_fuzzer_finds_an_error_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(base.checkpoint.checkpoint, "CheckpointError", ValueError)
    monkeypatch.setattr(targets, "ProjectError", KeyError)
    with pytest.raises(ValueError, match="input|no such checkpoint"):
        fuzz("checkpoint", tmp_path)
