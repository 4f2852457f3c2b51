"""Random numbers that a thread draws ahead on a GPU: the same as those that are drawn in place, in
pinned memory, and never with a thread that outlives the minibatches of an epoch."""

import random
import threading
from contextlib import nullcontext
from functools import cache

import pytest
import torch

# The first backward pass would import it, in the middle of the fake device's modes
import torch._dynamo
from fake_device import fake_device

from base import draws_ahead
from base.base_trainer import BaseTrainer
from base.distributed import Shard, ShardedGenerator
from base.draws_ahead import DrawsAhead
from base.seeding import torch_generator
from data_loader import workers
from experiment.experiment import resume
from tiny_runs import config_of, difference, interrupt, run, write_images

pytestmark = pytest.mark.usefixtures("only_few_digits")

METHODS = {
    "pgd": {"method": "pgd", "steps": 1},
    "two restarts under l2": {
        "method": "pgd",
        "steps": 1,
        "restarts": 2,
        "norm": "l2",
        "epsilon": 0.5,
    },
    "trades": {"method": "trades", "steps": 1},
}
DRAWS = {"pgd": 1, "two restarts under l2": 4, "trades": 1}
"""Draws in a minibatch."""


def config_on(device, method="pgd", subset=0.052, **sections):
    """A run of two epochs of three minibatches, of which the last is short."""
    few = {"validate_images": 8, "report_images": 8}
    return config_of(
        arch={"args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
        trainer={"epochs": 2, "subset_percent": subset},
        adversarial={**few, **METHODS[method]},
        pgd_attack={"K": 1},
        system={"device": device, "precision": "fp32"},
        **sections,
    )


def alive():
    """Whether a thread exists that draws ahead."""
    return any(draws_ahead.THREAD in thread.name for thread in threading.enumerate())


def watch(monkeypatch):
    """Return two lists, into which the draws of attacks in training go: how many images each is
    for and whether the thread has made it; and the minibatches for which the thread draws."""
    draws, ahead = [], []
    plain = draws_ahead._GeneratorAhead.draw
    order = draws_ahead._GeneratorAhead.order

    def watched(self, distribution, shape, part):
        drawn = plain(self, distribution, shape, part)
        # What is drawn in place is pinned later
        draws.append((len(drawn), drawn.is_pinned()))
        return drawn

    def ordered(self, *wanted):
        ahead.append(self.key[-1])
        order(self, *wanted)

    monkeypatch.setattr(draws_ahead._GeneratorAhead, "draw", watched)
    monkeypatch.setattr(draws_ahead._GeneratorAhead, "order", ordered)
    return draws, ahead


@pytest.fixture(scope="module")
def in_place(tmp_path_factory):
    """A function that returns the folder of a method's run on the fake device that draws in place,
    which is made once."""

    @cache
    def folder_of(method):
        folder = tmp_path_factory.mktemp("in_place")
        with pytest.MonkeyPatch.context() as patch, fake_device(patch):
            patch.setattr(DrawsAhead, "thread", lambda self, device: nullcontext())
            run(folder / "run", config_on("cuda", method))
        return folder / "run"

    return folder_of


def differences(*folders):
    """Return where two runs differ."""
    different = difference(*(folder / "model_last.pth" for folder in folders))
    metrics = {(folder / "metrics.jsonl").read_bytes() for folder in folders}
    return different + ["metrics.jsonl"] * (len(metrics) > 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_the_same_numbers_and_the_thread_has_drawn_them(
    method, monkeypatch, tmp_path, in_place
):
    with fake_device(monkeypatch), monkeypatch.context() as patch:
        draws, ahead = watch(patch)
        run(tmp_path / "run", config_on("cuda", method))
    assert not alive()
    # No minibatch is before an epoch's first one, and the last is shorter than the one before it
    short = draws[-1][0]
    assert 0 < short < 8
    epoch = [(8, False), (8, True), (short, False)]
    assert draws == [draw for draw in epoch * 2 for _ in range(DRAWS[method])]
    assert ahead == [batch for batch in (1, 2) * 2 for _ in range(DRAWS[method])]
    assert differences(tmp_path / "run", in_place(method)) == []


def test_numbers_of_another_minibatch_would_be_found(monkeypatch, tmp_path, in_place):
    plain = draws_ahead._GeneratorAhead._draw_ahead

    def off_by_one(self, distribution, shape, part):
        before, _, after = plain(self, distribution, shape, part)
        *key, batch = self.key
        numbers = distribution(shape, generator=torch_generator(*key, batch + 1))[part]
        return before, numbers.pin_memory(), after

    with fake_device(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(draws_ahead._GeneratorAhead, "_draw_ahead", off_by_one)
        run(tmp_path / "run", config_on("cuda"))
    assert differences(tmp_path / "run", in_place("pgd"))


def test_a_thread_that_is_at_another_minibatch_is_not_believed(monkeypatch, tmp_path, in_place):
    def off_by_one(*key_and_batch):
        *key, batch = key_and_batch
        return torch_generator(*key, batch + 1)

    with fake_device(monkeypatch), monkeypatch.context() as patch:
        draws, _ = watch(patch)
        patch.setattr(draws_ahead, "torch_generator", off_by_one)
        run(tmp_path / "run", config_on("cuda"))
    assert draws
    assert not any(by_thread for _, by_thread in draws)
    assert differences(tmp_path / "run", in_place("pgd")) == []


def test_the_thread_lives_among_an_epochs_minibatches_only(monkeypatch, tmp_path):
    seen = []

    def note(name):
        plain = getattr(BaseTrainer, name)

        def noted(*arguments):
            seen.append((name, alive()))
            return plain(*arguments)

        patch.setattr(BaseTrainer, name, noted)

    with fake_device(monkeypatch), monkeypatch.context() as patch:
        for name in ("_train_epoch", "update", "validate", "_finish_epoch"):
            note(name)
        run(tmp_path / "run", config_on("cuda"))
    epoch = [("_train_epoch", False), *[("update", True)] * 3, ("validate", False)]
    assert seen == [*epoch, ("_finish_epoch", False)] * 2


def test_no_thread_is_alive_where_image_workers_are_forked(monkeypatch, tmp_path):
    write_images(tmp_path / "train", {"a": 24, "b": 24})
    write_images(tmp_path / "test", {"a": 8, "b": 8})
    args = {"data_dir": str(tmp_path), "in_memory": False, "num_workers": 2}
    at_forks = []
    start = workers._start

    def noted(*arguments):
        at_forks.append(alive())
        start(*arguments)

    with fake_device(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(workers, "_start", noted)
        draws, _ = watch(patch)
        loader = {"type": "ImageFolderDataLoader", "args": args}
        run(tmp_path / "run", config_on("cuda", subset=1.0, data_loader=loader))
    assert any(by_thread for _, by_thread in draws)
    # In both epochs, and in their validations
    assert len(at_forks) >= 4
    assert not any(at_forks)


def test_a_stop_ends_the_thread_and_a_resumed_run_has_the_same_numbers(
    monkeypatch, tmp_path, in_place
):
    with fake_device(monkeypatch):
        # In the middle of the second epoch
        interrupt(monkeypatch, tmp_path / "run", config_on("cuda"), after=5)
        assert not alive()
        resume(str(tmp_path / "run"))
    assert differences(tmp_path / "run", in_place("pgd")) == []


@pytest.mark.parametrize(
    ("owner", "name", "thread"),
    [
        (BaseTrainer, "update", "MainThread"),
        (draws_ahead._GeneratorAhead, "_draw_ahead", draws_ahead.THREAD),
    ],
)
def test_an_error_reaches_the_caller_and_ends_the_thread(
    owner, name, thread, monkeypatch, tmp_path
):
    def broken(*_):
        raise ZeroDivisionError(threading.current_thread().name)

    with fake_device(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(ZeroDivisionError, match=thread):
            run(tmp_path / "run", config_on("cuda"))
    assert not alive()


def test_on_the_cpu_there_is_no_thread(monkeypatch, tmp_path):
    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr(DrawsAhead, "thread", forbidden)
    run(tmp_path / "run", config_on("cpu"))


def draws_of(choices):
    """Return the draws of a minibatch: distribution, images, part, and whether they are made past
    `draw`, by torch itself."""
    return [
        (
            choices.choice((torch.rand, torch.randn)),
            (choices.choice((8, 8, 3)), 3, 5),
            choices.choice((slice(None), slice(1, 8, 2))),
            choices.random() < 0.1,
        )
        for _ in range(choices.randrange(5))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_the_numbers_are_those_of_a_plain_generator(seed, monkeypatch):
    choices = random.Random(seed)
    wanted, taken = draws_of(choices), 0
    ahead = DrawsAhead()
    with fake_device(monkeypatch), ahead.thread(torch.device("cuda")):
        for batch in range(40):
            # Now and then a minibatch asks for other draws than the one before it
            if choices.random() < 0.3:
                wanted = draws_of(choices)
            # Now and then one is left out
            if choices.random() < 0.1:
                continue
            key = (seed, "attack", 1, batch)
            plain, generator = torch_generator(*key), ahead.generator(key, choices.random() < 0.1)
            for distribution, shape, part, past in wanted:
                expected = distribution(shape, generator=plain)[part]
                if past:
                    drawn = distribution(shape, generator=generator)[part]
                else:
                    drawn = draws_ahead.draw(distribution, shape, generator, part)
                assert torch.equal(drawn, expected)
                taken += drawn.is_pinned()
    assert taken > 10


def test_two_purposes_and_a_shard_are_drawn_ahead(monkeypatch):
    ahead = DrawsAhead()
    shard = Shard(8, rank=1, processes=2)
    with fake_device(monkeypatch), ahead.thread(torch.device("cuda")):
        for batch in range(3):
            for purpose in ("attack", "noise"):
                key = (1, purpose, 1, batch)
                drawn = ShardedGenerator(ahead.generator(key, False), shard).draw(torch.rand, (3,))
                assert torch.equal(drawn, torch.rand((8, 3), generator=torch_generator(*key))[1::2])
                assert drawn.is_pinned() == (batch > 0)
                assert drawn.is_contiguous() == (batch > 0)
