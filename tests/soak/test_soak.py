"""The soak and the fuzzer in small: a run that is ended again and again, and mutated files; both find what is broken."""

import json
from random import Random

import pytest
from torch.optim import Optimizer

import base.checkpoint
import soak.targets
from soak.endurance import Endurance, Tally
from soak.scenarios import SCENARIOS, SMALL, tree_of, write_images
from soak.targets import TARGETS, examine

PLATEAU = "standard, label noise, early stop, plateau"
MUTATIONS = 200


@pytest.fixture
def endure(tmp_path, monkeypatch):
    """Runs of four epochs, until there are enough; the tally."""
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
    tally = endure(lambda tally: tally.counts["saved at the step of the signal"])
    assert tally.failures == []
    assert tally.counts["minibatches"] == 36 * tally.counts["runs"]


def test_what_is_lost_is_found(endure, monkeypatch):
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, state: None)  # its momentum begins anew at every resume
    tally = endure(lambda tally: tally.failures or tally.counts["runs"] > 8)
    assert any("differs from the run that was left in peace" in failure for failure in tally.failures)


def test_scenarios_are_complete_configs():
    for name in SCENARIOS:
        assert json.loads(json.dumps(tree_of(name, "x")))["arch"]["type"] in ("simpleCNN", "wide_resnet")
    assert "data_dir" not in SMALL["data_loader"]["args"]


def mutated(data, random):
    """A few bytes changed, cut out or doubled."""
    data = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(data))
        match random.randrange(3):
            case 0:
                data[place] = random.randrange(256)
            case 1:
                del data[place : place + random.randrange(1, 20)]
            case 2:
                data[place:place] = data[place : place + random.randrange(1, 20)]
        data = data or bytearray(b"{")
    return bytes(data)


def fuzz(target, folder):
    """Counts of good and of refused files."""
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
def test_mutated_files_are_results_or_one_line(tmp_path, target):
    refused, _ = fuzz(target, tmp_path)
    assert refused > MUTATIONS / 4


def test_the_fuzzer_finds_an_error_that_is_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(base.checkpoint, "CheckpointError", ValueError)
    monkeypatch.setattr(soak.targets, "ProjectError", KeyError)
    with pytest.raises(ValueError, match="input"):
        fuzz("checkpoint", tmp_path)
