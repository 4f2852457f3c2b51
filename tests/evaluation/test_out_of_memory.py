"""A batch that does not fit into memory is halved, and no verdict changes."""

import logging
from importlib import import_module

import numpy as np
import pytest
import torch
import torch._dynamo  # not in the first backward pass, in the middle of the modes
from fake_device import fake_device
from torch import nn

from attacks import PGD
from base.errors import ConfigError
from evaluation.batches import FittingSize
from evaluation.reliability import doctor
from evaluation.robust_accuracy import attack_loader, robust_accuracy
from tiny_runs import read_arrays

ATTACK = PGD(0.02, 0.006, 3, early_stop=True)


class Small(nn.Module):
    """Takes so many images at a time; notes the sizes of its batches."""

    def __init__(self, largest):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        self.largest = largest
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return self.layers(images)


def problem(n=90):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 8, 8, generator=generator)
    with torch.no_grad():
        labels = Small(n)(images).argmax(dim=1)
    return images, labels


def same(report, expected):
    arrays = expected.arrays()
    return all(np.array_equal(array, arrays[name]) for name, array in report.arrays().items())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_attack_goes_on_with_half_the_images(kind, monkeypatch, caplog, tmp_path):
    images, labels = problem()
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def evaluate(model, batch_size, name):
        data = [(images.to(kind), labels.to(kind))]
        return robust_accuracy(
            model.to(kind), data, ATTACK, batch_size=batch_size, save_images=tmp_path / name
        )

    def compare():
        small = evaluate(Small(24), 20, "small.npz")
        assert not caplog.records
        assert not emptied
        model = Small(24)
        halved = evaluate(model, 40, "halved.npz")
        assert same(halved.verdicts, small.verdicts)
        assert 0 < halved.robust_top1 < halved.clean_top1
        return [size for size in model.sizes if size > 24]

    with caplog.at_level(logging.WARNING):
        if kind == "cuda":
            with fake_device(monkeypatch):
                refused = compare()
            assert len(emptied) == len(refused)
        else:
            refused = compare()
    assert refused == [40]
    assert [record.message for record in caplog.records] == [
        "out of memory: continuing with batches of 20 images"
    ]
    small, halved = (read_arrays(tmp_path / f"{name}.npz") for name in ("small", "halved"))
    assert all(np.array_equal(small[name], halved[name]) for name in small)


def test_memory_that_runs_out_later_halves_what_follows(caplog):
    images, labels = problem(64)
    whole = attack_loader(Small(64), [(images, labels)], ATTACK, seed=0)
    model = Small(64)
    batches = [(images[:32], labels[:32]), (images[32:], labels[32:])]

    def shrinking():
        yield batches[0]
        model.largest = 16
        yield batches[1]

    assert same(attack_loader(model, shrinking(), ATTACK, seed=0), whole)
    assert [record.message[-9:] for record in caplog.records] == ["16 images"]


def test_a_single_image_that_does_not_fit_is_an_error_of_one_line(caplog):
    images, labels = problem(6)
    message = r"^batch_size: .*CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"
    with pytest.raises(ConfigError, match=message):
        robust_accuracy(Small(0), [(images, labels)], ATTACK)
    assert not caplog.records


NO_CONVOLUTION = "GET was unable to find an engine to execute this computation"


def test_images_are_halved_where_cudnn_has_no_convolution(caplog):
    """It says so, and nothing of memory, if none of its convolutions has enough of it."""

    def fits(size, largest):
        if size > largest:
            raise RuntimeError(NO_CONVOLUTION)
        return size

    assert FittingSize().run(lambda size: fits(size, 3), 8) == 2
    assert [record.message[-8:] for record in caplog.records] == ["2 images"]
    with pytest.raises(RuntimeError, match=f"^{NO_CONVOLUTION}$"):
        FittingSize().run(lambda size: fits(size, 0), 8)


def test_other_errors_are_not_tried_again():
    calls = []

    def fails(size):
        calls.append(size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        FittingSize().run(fails, 8)
    assert calls == [8]


def test_a_process_that_halves_alone_asks_the_others_as_often(monkeypatch):
    module = import_module("evaluation.robust_accuracy")
    images, labels = problem()
    asked = []

    def gather(value):
        asked.append(type(value))
        return [value]

    monkeypatch.setattr(module, "all_gather_object", gather)
    robust_accuracy(Small(90), [(images, labels)], ATTACK)
    expected = asked[:]
    asked.clear()
    model = Small(24)
    robust_accuracy(model, [(images, labels)], ATTACK)
    assert max(model.sizes) > 24
    assert asked == expected
    assert len(expected) > 2


def test_the_doctor_halves_its_batches_too(caplog, monkeypatch):
    module = import_module("evaluation.reliability")
    monkeypatch.setattr(module, "CHECKS", [module.gradients, module.epsilon_zero])
    images, labels = problem(40)
    found = [doctor(Small(largest), [(images, labels)], ATTACK) for largest in (40, 24)]
    assert found[0].checks == found[1].checks
    assert [record.message[-9:] for record in caplog.records] == ["20 images"]
