"""What two gloo processes that train together exchange: gradients, statistics, signals."""

import json
from itertools import pairwise

import pytest

from tests.base.distributed.two_processes import ended, start_two

SCRIPT = """
import json, sys, time
from copy import deepcopy
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import base.signals
from base.command_line import run_script
from base.distributed import all_gather_object, distributed_session, rank
from base.distributed.collectives import broadcast
from base.distributed.ddp import wrap_ddp
from base.signals import StopQuestions

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))

def trained(wrap, steps=4):
    '''The network, its optimizer and its last gradients.'''
    model = network().to(memory_format=torch.channels_last)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank())
    for _ in range(steps):
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        wrapped(torch.rand(6, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters()]
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return list(model.parameters()), momenta, gradients

def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

def gradients(facts):
    ours = trained(wrap_ddp)
    plain = trained(DistributedDataParallel)
    facts["same bits"] = [same(a, b) for a, b in zip(ours, plain, strict=True)]
    # A gradient of its own has memory of its own
    def shared(gradients):
        return len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    facts["share memory"] = [shared(ours[2]), shared(plain[2])]

def compression(facts):
    exact = trained(wrap_ddp, 1)[2]
    low = trained(lambda model: wrap_ddp(model, "bf16"), 1)[2]
    facts["compressed"] = [same(low, [gradient.bfloat16().float() for gradient in low]),
                           same(exact, [gradient.bfloat16().float() for gradient in exact])]
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, low, strict=True)]
    facts["compression error"] = max(errors)
    weights = [p.tolist() for p in trained(lambda model: wrap_ddp(model, "bf16"))[0]]
    of_all = all_gather_object(weights)
    facts["equal copies"] = of_all[0] == of_all[1]

def statistics(facts):
    tensors = [torch.full((3, 2), float(rank())), torch.full((2, 3), 5.0 + rank()).mT,
               torch.tensor(7 + rank()), torch.full((2, 4, 3, 3), 9.0 + rank()).contiguous(
                   memory_format=torch.channels_last)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    broadcast(tensors)
    facts["received"] = [sorted({float(x) for x in tensor.flatten()}) for tensor in tensors]
    facts["in place"] = addresses == [tensor.data_ptr() for tensor in tensors]

def questions(facts):
    def asked_after(seconds, batches, signal_at):
        stop, found = StopQuestions(), []
        for batch in range(1, batches + 1):
            time.sleep(seconds)
            if stop.due(at_end=batch == batches):
                # Only rank 1 has been signalled
                answer = stop.ask(15 if rank() == 1 and batch >= signal_at else None)
                found.append((batch, answer))
                if answer:
                    break
        return found
    # Rank 1 alone is slow
    facts["slow"] = asked_after(0.35 * rank(), 9, 99)
    # A busy machine may make any minibatch slow
    base.signals.QUESTION_SECONDS = 1000.0
    facts["fast"] = asked_after(0.0, 44, 99)
    facts["stop"] = asked_after(0.0, 44, 11)

def main():
    facts = {}
    with distributed_session(training=True):
        for part in (gradients, compression, statistics, questions):
            part(facts)
        with open(f"{sys.argv[1]}/{rank()}.json", "w") as file:
            json.dump(facts, file)

run_script(main)
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What both processes found, by rank."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    codes, errors = ended(start_two(folder / "script.py", folder))
    assert codes == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_gradients_lie_in_the_buckets_and_weights_and_momenta_are_the_same_bits(facts):
    for of_rank in facts:
        assert of_rank["same bits"] == [True, True, True]
        assert of_rank["share memory"] == [True, False]


def test_compressed_gradients_are_rounded_and_copies_stay_equal(facts):
    for of_rank in facts:
        assert of_rank["compressed"] == [True, False]
        assert 0 < of_rank["compression error"] < 0.01
        assert of_rank["equal copies"]


def test_statistics_of_any_dtype_and_layout_are_those_of_rank_0_in_place(facts):
    for of_rank in facts:
        assert of_rank["received"] == [[0], [5], [7], [9]]
        assert of_rank["in place"]


def test_signals_are_asked_after_every_eighth_minibatch_and_at_the_end(facts):
    batches = [batch for batch, _ in facts[0]["fast"]]
    assert batches == [1, 9, 17, 25, 33, 41, 44]


def test_signals_are_asked_more_often_where_the_slowest_process_is_slow(facts):
    batches = [batch for batch, _ in facts[0]["slow"]]
    gaps = {later - batch for batch, later in pairwise(batches)}
    assert gaps <= {1, 2}, "at most a second, of minibatches of 0.35 s"


def test_all_processes_stop_after_the_same_minibatch(facts):
    assert facts[0] == facts[1]
    assert facts[0]["stop"] == [[1, 0], [9, 0], [17, 15]]
