"""How a minibatch is shared out: every image once, the same numbers drawn, the mean of the
whole."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from base.distributed import (
    Shard,
    ShardedGenerator,
    all_gather_object,
    all_reduce_max,
    distributed_session,
    from_primary,
    shard_of,
)
from base.distributed.session import _explained, _meet
from base.errors import ProjectError
from tests.base.distributed.two_processes import ended, start_two


def shares(total, processes):
    return [Shard(total, rank, processes) for rank in range(processes)]


@pytest.mark.parametrize(("total", "processes"), [(9, 2), (8, 2), (7, 3), (3, 3), (5, 1)])
def test_every_image_is_computed_once_and_the_gradients_average_is_that_of_the_mean(
    total, processes
):
    images = torch.arange(total)
    parts = [images[share.part] for share in shares(total, processes)]
    assert sorted(torch.cat(parts).tolist()) == images.tolist()
    assert all(
        share.counts and len(part)
        for share, part in zip(shares(total, processes), parts, strict=True)
    )
    losses = torch.rand(total, dtype=torch.float64)
    averaged = sum(share.mean(losses[share.part]) for share in shares(total, processes)) / processes
    assert float(averaged) == pytest.approx(float(losses.mean()), rel=1e-12)


@pytest.mark.parametrize("total", [1, 2])
def test_fewer_images_than_processes_are_computed_by_all_and_counted_by_one(total):
    losses = torch.rand(total)
    for share in shares(total, 3):
        assert share.copied
        assert torch.equal(losses[share.part], losses)
        assert float(share.mean(losses)) == float(losses.mean())
        assert share.counts == (share.rank == 0)
    own = torch.cat([torch.arange(total)[share.own] for share in shares(total, 3)])
    assert own.tolist() == list(range(total)), "what is carried on has one owner"


def test_draws_do_not_depend_on_the_number_of_processes():
    whole = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    for share in shares(7, 3):
        drawn = ShardedGenerator(torch.Generator().manual_seed(1), share).draw(torch.randn, (2,))
        assert torch.equal(drawn, whole[share.part])


def test_one_process_has_all_and_says_what_it_says():
    with distributed_session(training=True):
        assert shard_of(5) == Shard(5, 0, 1)
        assert (all_gather_object("a"), all_reduce_max(3), from_primary(lambda: 7)) == (["a"], 3, 7)


def test_processes_meet_although_the_store_holds_what_dead_ones_said():
    store = dist.HashStore()
    store.set("asks 1", "token of a dead process")
    store.set("asks 2", "token of another")
    with ThreadPoolExecutor(3) as pool:
        # the first comes first and finds only the words of the dead
        met = [pool.submit(_meet, store, number, 3) for number in range(3)]
        parts = [part.result(timeout=200) for part in met]
    parts[0].set("key", "new")
    assert [part.get("key") for part in parts] == [b"new"] * 3
    with ThreadPoolExecutor(3) as pool:
        again = [
            part.result(timeout=200)
            for part in [pool.submit(_meet, store, number, 3) for number in range(3)]
        ]
    assert not again[1].check(["key"]), "the next attempt has a part of its own"


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details)\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"
)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("said", "beginning", "end"),
    [
        (
            f"{GLOO}Connection closed by peer [127.0.0.1]:4. This may be",
            "another process has ended (Connection closed by",
            "too",
        ),
        (
            f"{GLOO}Read error [10.0.0.1]:4: Connection reset by peer",
            "another process has ended (Read error",
            "ends, too",
        ),
        (
            "NCCL error\nncclRemoteError: A call failed possibly due to a remote process exiting",
            "another process",
            "too",
        ),
        (
            NCCL,
            "the processes cannot work together: NCCL error in: ",
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
        ),
        (
            f"{GLOO}Timed out waiting 18ms for recv\nException raised from f at a.cpp:1",
            "the processes cannot",
            "18ms for recv",
        ),
        ("", "the processes cannot work together: ", "DistBackendError"),
    ],
)
def test_only_an_end_is_called_one_and_no_cause_is_lost(said, beginning, end):
    sentence = _explained(dist.DistBackendError(said))
    assert sentence.startswith(beginning)
    assert sentence.endswith(end)
    assert "\n" not in sentence


def test_the_cause_of_a_failed_connection_is_kept(monkeypatch):
    cause = dist.DistBackendError(NCCL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr("base.distributed.session._meet", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with (
        pytest.raises(ProjectError, match="rank 1: the processes cannot work together") as caught,
        distributed_session(),
    ):
        raise cause
    assert caught.value.__cause__ is cause


FAILS_ALONE = """
from base.command_line import run_script
from base.errors import DataError
from base.distributed import all_gather_object, rank, distributed_session

def main():
    with distributed_session():
        all_gather_object("begun")
        if rank() == 1:
            raise DataError("only here an image is broken")
        all_gather_object("done")

run_script(main)
"""


def test_where_one_process_fails_all_end_with_its_exit_code(tmp_path):
    (tmp_path / "script.py").write_text(FAILS_ALONE)
    codes, errors = ended(start_two(tmp_path / "script.py"))
    assert codes == [4, 4]
    assert errors[1].splitlines()[-1] == "error: only here an image is broken"
    assert "another process" not in errors[0], "one process says why"
