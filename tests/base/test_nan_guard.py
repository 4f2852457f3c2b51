"""Updates on finite gradients only, whether the host waits for the device before each or seldom."""

from copy import deepcopy
from math import inf, nan

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import base.nan_guard
from base.errors import NonFiniteError
from base.nan_guard import NanGuard, first_bad_output, first_bad_weight
from base.train_state import TrainState
from models.layers import ConvNorm2d
from tests.base.distributed.two_processes import ended, start_two

FUSED = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
]


class Reads(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value, for which a GPU's host has to wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Run:
    """A small network, its optimizer and a guard, trained on one input at a time; `added` changes
    the loss and not its gradient."""

    def __init__(self, folder, cls=torch.optim.SGD, deferred=True, **args):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.optimizer = cls(self.model.parameters(), **{"lr": 0.1, "fused": True, **args})
        self.guard = NanGuard(self.optimizer, folder)
        self.guard.deferred_on = ("cpu",) if deferred else ()
        self.state = TrainState(epochs_done=3)

    def update(self, value, added=0.0):
        self.optimizer.zero_grad()
        loss = self.model(torch.tensor([[value, 1.0]])).square().sum() + added
        loss.backward()
        self.guard.check(self.model, loss, self.state)
        self.optimizer.step()
        self.state.batches_done += 1

    def numbers(self):
        """Weights and the optimizer's state."""
        return deepcopy([list(self.model.parameters()), list(self.optimizer.state.values())])


def equal(numbers, others):
    weights, values = numbers
    other_weights, other_values = others
    assert len(values) == len(other_values)
    pairs = [(weights, other_weights)]
    pairs += [
        (list(a.values()), list(b.values())) for a, b in zip(values, other_values, strict=True)
    ]
    return all(x is y or torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("cls", "args"), FUSED)
def test_finite_updates_are_the_same_bit_for_bit(tmp_path, cls, args):
    later, at_once = Run(tmp_path, cls, **args), Run(tmp_path, cls, deferred=False, **args)
    before = later.numbers()
    for value in range(6):
        later.update(value)
        at_once.update(value)
    later.guard.check_pending()
    assert equal(later.numbers(), at_once.numbers())
    assert not torch.equal(before[0][0], later.numbers()[0][0])


@pytest.mark.parametrize(("cls", "args"), FUSED)
@pytest.mark.parametrize("bad", [(nan, 0.0), (inf, 0.0), (0.5, inf), (0.5, nan)])
def test_nothing_changes_from_the_first_bad_update_on(tmp_path, cls, args, bad):
    run = Run(tmp_path, cls, **args)
    run.update(1.0)
    run.update(2.0)
    good = run.numbers()
    run.update(*bad)
    for value in (3.0, nan, 4.0):
        run.update(value)
    assert equal(run.numbers(), good)
    with pytest.raises(
        NonFiniteError,
        match="^epoch 4, batch 3: the loss or the gradient is not finite: training stopped",
    ):
        run.guard.check_pending()


def test_a_bad_first_update_leaves_the_first_weights(tmp_path):
    run = Run(tmp_path, momentum=0.9)
    before = run.numbers()
    run.update(nan)
    run.update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before[0], run.numbers()[0], strict=True))
    with pytest.raises(NonFiniteError, match="epoch 4, batch 1: the loss or the gradient"):
        run.guard.check_pending()


@pytest.mark.parametrize("read_every", [1, 5, 50])
def test_the_host_waits_every_so_many_updates(tmp_path, monkeypatch, read_every):
    monkeypatch.setattr(base.nan_guard, "READ_EVERY", read_every)
    run = Run(tmp_path)
    with Reads() as reads:
        for _ in range(2 * read_every - 1):
            run.update(1.0)
    assert reads.count == 1
    with pytest.raises(
        NonFiniteError,
        match=f"batch {2 * read_every}: the loss is not finite, first in the gradient of 2.bias",
    ):
        run.update(nan)


def test_without_fused_kernels_the_host_waits_before_every_update(tmp_path):
    for options in (
        {"deferred": False},
        {"fused": False},
        {"fused": None},
        {"cls": torch.optim.Adam, "fused": False},
    ):
        run = Run(tmp_path, **options)
        with Reads() as reads:
            for value in (1.0, 2.0):
                run.update(value)
        assert reads.count >= 2
        good = run.numbers()
        with pytest.raises(
            NonFiniteError, match="batch 3: the loss is not finite, first in the gradient of 2.bias"
        ):
            run.update(nan)
        assert equal(run.numbers(), good)


def test_a_run_that_began_without_fused_kernels_goes_on_without(tmp_path):
    run, old = Run(tmp_path), Run(tmp_path, fused=None)
    old.update(1.0)
    run.update(1.0)
    run.optimizer.load_state_dict(old.optimizer.state_dict())
    with pytest.raises(
        NonFiniteError, match="batch 2: the loss is not finite, first in the gradient of 2.bias"
    ):
        run.update(nan)


SCRIPT = """
import os, sys
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from base.errors import NonFiniteError
from base.distributed import distributed_session, rank
from tests.base.test_nan_guard import Run, inf

with distributed_session(training=True):
    for deferred in (True, False):
        run = Run(Path(sys.argv[1]), deferred=deferred)
        layers, run.model = run.model, DistributedDataParallel(run.model)
        run.update(1.0 + rank())
        good = layers[0].weight.clone()
        message = "nothing"
        try:
            run.update(1.0, added=inf * rank() if rank() else 0.0)  # the gradient is finite on both
            run.update(2.0)
            run.guard.check_pending()
        except NonFiniteError as error:
            message = str(error)
        except SystemExit as error:
            message = f"exit {error.code}"
        line = f"{deferred} rank {rank()}: {message}; kept {bool((layers[0].weight == good).all())}"
        Path(sys.argv[1], f"{deferred} {rank()}").write_text(line)
"""


def test_all_processes_stop_at_a_loss_that_only_one_has_computed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    codes, errors = ended(start_two(tmp_path / "script.py", tmp_path))
    assert codes == [0, 0], errors
    printed = {
        path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "script.py"
    }
    assert (
        "True rank 0: epoch 4, batch 2: the loss or the gradient is not finite" in printed["True 0"]
    )
    message = "False rank 0: epoch 4, batch 2: the loss or the gradient is not finite"
    assert message in printed["False 0"]
    assert all("kept True" in line for line in printed.values())
    assert printed["True 1"].startswith("True rank 1: exit 5;")
    assert printed["False 1"].startswith("False rank 1: exit 5;")


def test_looking_for_a_bad_output_leaves_no_trace():
    """The first pass in training gives ConvNorm's `running_V` another size."""
    model = nn.Sequential(ConvNorm2d(2, 3, 3), nn.Dropout())
    before = deepcopy(model.state_dict())
    images = torch.rand(2, 2, 6, 6)
    rng_state = torch.get_rng_state()
    assert first_bad_output(model, images) is None
    found = first_bad_output(model, torch.full((2, 2, 6, 6), nan))
    assert found == "the output of 0.bpconv (Conv2d)"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), rng_state)


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_bad_parameter_or_buffer_is_named(name):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    assert first_bad_weight(model) is None
    getattr(model[1], name).data[1] = torch.inf
    assert first_bad_weight(model) == f"1.{name}"
