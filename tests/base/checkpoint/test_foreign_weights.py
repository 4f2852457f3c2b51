"""Files of other code bases: their weights are found, their keys become the model's, and every
other entry needs an explanation.
"""

from typing import ClassVar

import pytest
import torch
from torch import nn

from base.checkpoint import load_checkpoint, load_weights
from base.errors import CheckpointError


class Small(nn.Module):
    """A network that normalizes its five channels, with a nested module and an unused one."""

    unused_modules: ClassVar = {"spare": "body"}

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(1, 5, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, 5, 1, 1), persistent=False)


def small(seed=0):
    torch.manual_seed(seed)
    model = Small()
    nn.init.normal_(model.body[1].running_mean)
    return model


def below(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def load(tmp_path, contents, weights=None):
    """Return a model with a file's weights, and what was assumed."""
    path = tmp_path / "weights.pth"
    torch.save(contents, path)
    model, checkpoint = small(1), load_checkpoint(path, weights)
    fitted = load_weights(model, checkpoint["state_dict"], path)
    return model, checkpoint["assumed"] | fitted


def is_that_of(model, seed=0):
    expected = small(seed).state_dict()
    return all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


STATE = small().state_dict()
OTHER = small(2).state_dict()
PLACES = {
    "bare": (STATE, {}),
    "state_dict": ({"state_dict": STATE, "epoch": 3.5, "scheduler": None, "config": {"lr": 1}}, {}),
    "another key": (
        {"net": STATE, "acc": 93.1, "rng": {"cpu": torch.get_rng_state()}},
        {"weights": "'net' of the file"},
    ),
    "deeper": (
        {
            "saved": {
                "student": STATE,
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
            }
        },
        {"weights": "'saved.student' of the file"},
    ),
    "beside others": (
        {"state_dict": STATE, "ema_weights": OTHER},
        {"weights": "'state_dict' of the file, which also holds 'ema_weights'"},
    ),
    **{
        f"prefix {prefix}": (below(prefix, STATE), {"keys": f"the prefix {prefix!r} is dropped"})
        for prefix in ("module.", "1.", "0.1.", "_orig_mod.", "encoder.net.module.", "body.")
    },
    "second names": (
        {**STATE, "probe.0.weight": STATE["body.0.weight"]},
        {"left out": "second names of the same tensors (probe.0.weight)"},
    ),
    "equal copy": (
        below("a.", STATE)
        | below("a.teacher.", {key: value.clone() for key, value in STATE.items()}),
        {
            "keys": "the prefix 'a.' is dropped",
            "left out": "9 keys under 'a.teacher.', equal to the weights",
        },
    ),
    "averaged model": (
        {"n_averaged": torch.tensor(7), **below("module.", STATE)},
        {"keys": "the prefix 'module.' is dropped", "left out": "counters (n_averaged)"},
    ),
    "unused": (
        below("m.", STATE)
        | below(
            "m.spare.",
            {key[5:]: value + 1 for key, value in STATE.items() if key.startswith("body.")},
        ),
        {
            "keys": "the prefix 'm.' is dropped",
            "left out": "7 keys of 'spare', which no forward pass of its code calls",
        },
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_weights_are_found_wherever_they_are(name, tmp_path):
    contents, expected = PLACES[name]
    model, assumed = load(tmp_path, contents)
    assert is_that_of(model)
    assert assumed == expected
    assert torch.equal(model.mean, torch.zeros(1, 5, 1, 1))


MEAN, STD = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([0.5, 0.4, 0.3, 0.2, 1.0])
NORMALIZED = {
    "mu and sigma": {**STATE, "mu": MEAN.reshape(5, 1, 1), "sigma": STD.reshape(5, 1, 1)},
    "under a wrapper": {"state_dict": below("module.", {**STATE, "mu": MEAN, "sigma": STD})},
    "first layer": {
        "0.mean": MEAN.reshape(1, 5, 1, 1),
        "0.std": STD.reshape(1, 5, 1, 1),
        **below("1.", STATE),
    },
    "twice": {
        "model": below("module.model.", STATE)
        | below("module.normalizer.new_", {"mean": MEAN, "std": STD})
        | below("module.attacker.normalize.new_", {"mean": MEAN.clone(), "std": STD.clone()})
    },
    "beside the weights": {"state_dict": STATE, "mean": MEAN.tolist(), "std": tuple(STD.tolist())},
    "double precision": {"net": STATE, "mu": MEAN.double(), "sigma": STD.double()},
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_mean_and_std_beside_the_weights_are_the_models(name, tmp_path):
    model, assumed = load(tmp_path, NORMALIZED[name])
    assert is_that_of(model)
    torch.testing.assert_close((model.mean.flatten(), model.std.flatten()), (MEAN, STD))
    assert assumed["normalization"].startswith(
        "mean 0.1, 0.2, 0.3, 0.4, 0.5 and std 0.5, 0.4, 0.3, 0.2, 1, from '"
    )


@pytest.mark.parametrize("choice", ["last", "best"])
def test_one_of_several_sets_must_be_chosen(choice, tmp_path):
    for contents in ({"last": STATE, "best": OTHER}, below("last.", STATE) | below("best.", OTHER)):
        with pytest.raises(
            CheckpointError,
            match=r"holds several sets of weights.*'last\.?'.*'best\.?'.*; choose with --weights",
        ):
            load(tmp_path, contents)
        model, assumed = load(tmp_path, contents, choice)
        assert is_that_of(model, {"last": 0, "best": 2}[choice])
        assert assumed["weights"] == f"{choice!r} of the file, as asked"
    with pytest.raises(
        CheckpointError,
        match="--weights bset: .*weights.pth holds no such weights, but 'last', 'best'",
    ):
        load(tmp_path, {"last": STATE, "best": OTHER}, "bset")


REFUSED = {
    "another layer": (
        {**STATE, "gate.weight": torch.ones(2)},
        r"1 keys .*\(gate.weight, .*save it without them",
    ),
    "a set of other values": (
        STATE | below("ema.", OTHER),
        r"several sets of weights, with keys that begin with '' and 'ema\.'",
    ),
    "part of an unused module": ({**STATE, "spare.0.bias": torch.ones(4)}, r"\(spare.0.bias, "),
    "unused in another shape": (
        STATE | {f"spare.{key[5:]}": torch.ones(2) for key in STATE if key[:5] == "body."},
        "spare.0",
    ),
    "another network": (
        {"conv\x1b[2J\n.weight": torch.ones(2), "b": torch.ones(1)},
        r"its keys: conv\\x1b\[2J\\n.weight, b; the model's: body.0.weight, body.0.bias,"
        r" body.1.weight, ... \(9\); give",
    ),
    "other sizes": (
        {**STATE, "fc.weight": torch.ones(7, 4), "fc.bias": torch.ones(7)},
        r"\[7.*\[3.*arch\.args.*num_classes",
    ),
    "another number of channels": (
        {**STATE, "mu": torch.ones(3), "sigma": torch.ones(3)},
        r"2 keys .*\(mu, ",
    ),
    "a mean without a std": ({**STATE, "mu": torch.zeros(5)}, r"1 keys .*\(mu, "),
    "two means": (
        {
            **STATE,
            **below("a.", {"mean": MEAN, "std": STD}),
            **below("b.", {"mean": STD, "std": STD}),
        },
        r"4 keys .*\(a.mean, ",
    ),
    "other pixels": (
        {**STATE, "mu": 255 * MEAN, "sigma": STD},
        r"mean 25.5, .* its 'mu' and 'sigma'; .*pixels in \[0, 1\]",
    ),
    "no number": (
        {**STATE, "mu": MEAN, "sigma": STD * float("nan")},
        r"std nan, .*pixels in \[0, 1\]",
    ),
    "a number among them": ({"state_dict": {**STATE, "n": 3}, "ema": OTHER}, r"1 keys .*\(n, "),
    "keys that are not names": ({"state_dict": {0: torch.ones(2)}}, "keys that are not names: 0"),
    "nothing": (
        {"epoch": 3, "optimizer": {"state": {}}},
        "no 'state_dict' and no other weights, but the keys epoch, optimizer;",
    ),
    "quantized": (
        {**STATE, "fc.weight": torch.ones_like(STATE["fc.weight"], dtype=torch.int8)},
        "'fc.weight' is int8, strided; expected a dense tensor of floating-point numbers",
    ),
    "complex": (
        {**STATE, "fc.weight": STATE["fc.weight"].to(torch.complex64)},
        "'fc.weight' is complex64, strided; expected",
    ),
    "sparse": (
        {**STATE, "fc.weight": STATE["fc.weight"].to_sparse()},
        "'fc.weight' is float32, sparse_coo; expected",
    ),
    "no memory": ({**STATE, "fc.bias": torch.empty(3, device="meta")}, "a meta tensor; expected"),
    "a tensor": (torch.ones(3), "but an object of type Tensor; expected names with tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unexplained_entries_are_refused_and_both_sides_are_named(name, tmp_path):
    contents, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, contents)
    assert str(caught.value).isprintable()


def test_a_dictionary_that_contains_itself_is_searched_once(tmp_path):
    contents = {"epoch": 3}
    for _ in range(40):
        contents = {"a": contents, "b": contents}
    contents["all"] = contents
    with pytest.raises(CheckpointError, match="no other weights, but the keys a, b, all;"):
        load(tmp_path, contents)
    contents["b"]["b"]["net"] = STATE
    model, assumed = load(tmp_path, contents)
    assert is_that_of(model)
    assert assumed["weights"] == "'a.a.net' of the file"


def test_a_network_that_does_not_normalize_takes_no_mean():
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"2 keys .*\(mu, "):
        load_weights(
            model, {**model.state_dict(), "mu": torch.zeros(3), "sigma": torch.ones(3)}, "f.pth"
        )
