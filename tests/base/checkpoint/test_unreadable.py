"""A file that is not a checkpoint is explained in one line that never advises an unsafe read."""

import argparse
import collections
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from base.checkpoint import load_checkpoint
from base.errors import CheckpointError

WEIGHTS = {"fc.weight": torch.arange(600.0).reshape(3, 200), "fc.bias": torch.zeros(3)}


def bytes_of(contents):
    return lambda path: path.write_bytes(contents)


def saved(contents, **options):
    return lambda path: torch.save(contents, path, **options)


def cut(share, **options):
    def write(path):
        torch.save({"state_dict": WEIGHTS}, path, **options)
        contents = path.read_bytes()
        path.write_bytes(contents[: int(share * len(contents))])

    return write


def cut_at(word, length):
    """Write a file in torch's old format that ends within a name."""

    def write(path):
        torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=False)
        contents = path.read_bytes()
        path.write_bytes(contents[: contents.index(word) + length])

    return write


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, train_label=[1])


DAMAGED = "it is damaged, or torch.save did not write it"
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
CASES = {
    "empty": (bytes_of(b""), "it is empty"),
    "labels": (arrays, "it is an archive of NumPy arrays"),
    "text": (bytes_of(b"lr: 0.1\nepochs: 3\n"), DAMAGED),
    "pointer": (
        bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "`git lfs pull`",
    ),
    "safetensors": (
        bytes_of(len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4),
        "it is a safetensors file",
    ),
    "noise": (
        bytes_of(np.random.default_rng(0).bytes(5000)),
        DAMAGED,
    ),
    "truncated": (cut(0.6), "is damaged: its end is missing"),
    "truncated, old format": (
        cut(0.6, _use_new_zipfile_serialization=False),
        DAMAGED,
    ),
    "cut in a name": (
        cut(0.05, _use_new_zipfile_serialization=False),
        DAMAGED,
    ),
    "cut behind a dot": (
        cut_at(b"_rebuild_tensor_v2", 5),
        DAMAGED,
    ),
    "class": (
        saved({"state_dict": WEIGHTS, "log": collections.UserDict()}),
        "it holds objects of collections.UserDict;",
    ),
    "number of numpy": (
        saved({"state_dict": WEIGHTS, "acc": np.float64(0.5)}),
        "multiarray.scalar, numpy.dtype; only",
    ),
    "model": (saved(nn.Linear(3, 2)), "it holds objects of torch.nn.modules.linear.Linear;"),
    "plain pickle": (
        bytes_of(pickle.dumps(collections.UserDict(), protocol=2)),
        "it holds objects of collections.UserDict;",
    ),
    "protocol": (
        saved(WEIGHTS, pickle_protocol=4),
        DAMAGED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_it_is(name, tmp_path):
    write, expected = CASES[name]
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: is ")
    assert expected in message
    assert message.isprintable()
    assert "False" not in message
    assert "enforce fail" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_the_way_out_for_a_namespace_works_and_stays_safe(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    contents = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}
    torch.save(contents, "FILE", **options)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("FILE")
    message = str(caught.value)
    assert "argparse.Namespace" in message
    assert "weights_only=True" in message
    assert "weights_only=False" not in message
    with_block = message.split("`")[1]
    then = message.split(", then ")[1].split(" or ")[0]
    # The code that the message gives
    exec(f"{with_block}\n{then}", {"torch": torch, "argparse": argparse})  # noqa: S102
    assert torch.equal(
        load_checkpoint("weights.pth")["state_dict"]["fc.weight"], WEIGHTS["fc.weight"]
    )
