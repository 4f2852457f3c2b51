"""Any key of a checkpoint that is missing, of another type, out of range or contradicts another key
is reported in one line.
"""

from copy import deepcopy
from math import inf, nan
from pathlib import Path

import pytest
import torch

from base.checkpoint.schema import TrainingState, check_readable, check_training_state
from base.errors import CheckpointError

FILE = Path("file.pth")
GOOD = {
    "schema_version": 2,
    "epoch": 2,
    "batch": 1,
    "arch": "Net",
    "state_dict": {"weight": torch.zeros(7, 2)},
    "ema_state_dict": {"weight": torch.zeros(7, 2)},
    "ema_updates": 5,
    "optimizer": {
        "state": {"weight": {"checksum": "0"}},
        "param_groups": [{"params": ["weight"], "lr": 0.1}],
    },
    "optimizer_type": "SGD",
    "scheduler": {},
    "scheduler_type": "none",
    "monitor_best": 0.5,
    "progress": {
        "epochs_done": 2,
        "batches_done": 1,
        "learning_rate": 0.1,
        "history": [
            {"epoch": 1, "loss": 2.0, "val_loss": nan},
            {"epoch": 2, "loss": 1, "val_loss": None},
        ],
        "best_value": 0.5,
        "best_epoch": 1,
        "best_since": 1,
        "epochs_without_improvement": 1,
        "train_seconds": 0.25,
        "images_seen": 9,
    },
    "totals": {"sums": {"loss": torch.tensor(3.0)}, "count": 3},
    "method": {},
    "rng": {"cpu": torch.zeros(4, dtype=torch.uint8), "cuda": []},
    "config": {"name": "x", "data_loader": {"type": "D", "args": {"sizes": [1, 2.5, None, True]}}},
    "mean": [0.1, 0.2],
    "std": (0.3, 0.4),
    "class_names": ["a", "b", "c", "d"],
    "fingerprint": "0",
    "image_fingerprints": {"training images": "0"},
    "versions": {"torch": "2"},
}
OPTIONAL = {
    "schema_version",
    "arch",
    "ema_state_dict",
    "ema_updates",
    "method",
    "image_fingerprints",
    "versions",
    "monitor_best",
}
ODD = (
    None,
    True,
    3,
    -1,
    0.5,
    "text\nof two lines",
    b"x",
    [None],
    {"a": object},
    torch.zeros(2),
    {1: 2},
)


def refused(contents):
    with pytest.raises(CheckpointError, match=r"^file.pth: ") as caught:
        check_training_state(contents, FILE)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def at(contents, path):
    for name in path:
        contents = contents[name]
    return contents


def places(value, path=()):
    """Yield the path of every key of a tree."""
    below = ()
    if isinstance(value, dict):
        below = value.items()
    elif isinstance(value, (list, tuple)):
        below = enumerate(value)
    for key, inner in below:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_a_complete_checkpoint_is_accepted():
    check_training_state(GOOD, FILE)
    check_readable(GOOD, FILE)
    assert set(TrainingState.model_fields) | {"schema_version"} == set(GOOD), (
        "every key is tested here"
    )


@pytest.mark.parametrize("key", GOOD)
def test_keys_may_not_be_missing(key):
    contents = {other: value for other, value in GOOD.items() if other != key}
    if key in OPTIONAL:
        check_training_state(contents, FILE)
    else:
        assert ("evaluated, not resumed" if key == "progress" else "missing") in refused(contents)


FREE = ("optimizer.state.weight", "optimizer.param_groups.0", "scheduler", "method", "config")
"""Keys whose contents are checked elsewhere."""


@pytest.mark.parametrize(
    "path", [path for path in places(GOOD) if path[0] != "schema_version"], ids=str
)
def test_values_of_other_types_are_refused_in_one_line(path):
    dotted = ".".join(map(str, path))
    if any(dotted.startswith(f"{free}.") for free in FREE):
        return
    good = at(GOOD, path)
    for odd in ODD:
        same_kind = type(odd) is type(good) or (type(odd) in (int, float) and type(good) is float)
        fits = dotted in ("progress.history.0.val_loss", "progress.history.1.val_loss")
        if same_kind or odd is None or (fits and type(odd) in (int, float)):
            continue
        contents = deepcopy(GOOD)
        if isinstance(at(contents, path[:-1]), tuple):
            contents["std"] = list(contents["std"])
        if (
            type(odd) in (int, float)
            and dotted.startswith("progress.history")
            and path[-1] == "loss"
        ):
            continue
        at(contents, path[:-1])[path[-1]] = odd
        assert path[0] in refused(contents)


CONTRADICTIONS = {
    "epochs": ({"epoch": 3}, "epoch 3 and batch 1, but 'progress' is 2 epochs and 1 batches"),
    "negative": ({"batch": -1}, "'batch' is of type int (-1): expected greater than or equal to 0"),
    "history": ({"progress": {"history": []}}, "does not log the epochs from 1 to 2"),
    "other history": (
        {"progress": {"history": [{"epoch": 1}, {"epoch": 1}]}},
        "does not log the epochs from 1 to 2",
    ),
    "best epoch in the future": (
        {"progress": {"best_epoch": 3}},
        "'progress.best_epoch' is 3, but 2 epochs are done",
    ),
    "no images": ({"progress": {"images_seen": 0}}, "'progress.images_seen' is 0 after 2 epochs"),
    "no time": (
        {"progress": {"train_seconds": 0.0}},
        "'progress.train_seconds' is 0 after 2 epochs",
    ),
    "infinite": (
        {"progress": {"train_seconds": inf}},
        "'progress.train_seconds' is of type float (inf)",
    ),
    "no rate": (
        {"progress": {"learning_rate": None}},
        "'progress.learning_rate' is None after 1 batches",
    ),
    "unknown": ({"progress": {"worst_value": 1}}, "'progress.worst_value'"),
    "no sums": ({"totals": {"sums": {}}}, "'totals' are of 3 samples after 1 batches"),
    "no samples": ({"totals": {"count": 0}}, "'totals' are of 0 samples after 1 batches"),
    "channels": ({"mean": [0.5]}, "'mean' has 1 channels, 'std' 2"),
    "mean not finite": ({"mean": [0.5, nan]}, "'mean.1' is of type float (nan)"),
    "numbers of a generator": (
        {"rng": {"cpu": torch.zeros(4)}},
        "expected a list of bytes, not float32 of shape (4,)",
    ),
    "sparse weights": (
        {"state_dict": {"weight": torch.eye(3).to_sparse()}},
        "expected a dense tensor",
    ),
    "complex weights": (
        {"state_dict": {"weight": torch.zeros(7, 2) * 1j}},
        "expected a dense tensor of real numbers",
    ),
    "weights of words": (
        {"state_dict": {3: torch.zeros(1)}},
        "'state_dict.3.[key]' is of type int (3)",
    ),
    "not JSON": ({"config": {"name": nan}}, "'config' is of type dict: nan is not a finite number"),
    "a key that is not a string": (
        {"config": {"arch": {3: 1}}},
        "'config' is of type dict: a key of type int",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_values_agree_with_each_other(what):
    change, message = CONTRADICTIONS[what]
    contents = deepcopy(GOOD)
    for key, value in change.items():
        if key in ("progress", "totals", "rng"):
            contents[key] |= value
        else:
            contents[key] = value
    assert message in refused(contents)


def test_a_config_that_contains_itself_is_refused():
    contents = deepcopy(GOOD)
    contents["config"]["again"] = contents["config"]
    assert "nested deeper than 30 levels" in refused(contents)


def test_fields_that_are_newer_than_a_checkpoint_have_their_defaults():
    contents = deepcopy(GOOD)
    del contents["progress"]["best_since"]
    check_training_state(contents, FILE)


@pytest.mark.parametrize(
    "key",
    ["epoch", "batch", "config", "mean", "std", "class_names", "ema_state_dict", "schema_version"],
)
def test_evaluation_relies_on_types_too(key):
    for odd in (None, "text", {1: 2}, torch.zeros(1)):
        with pytest.raises(CheckpointError, match=f"file.pth: is not a checkpoint: '{key}"):
            check_readable({**GOOD, key: odd}, FILE)
    check_readable({"state_dict": {}, "optimizer": None, "progress": 3}, FILE)
