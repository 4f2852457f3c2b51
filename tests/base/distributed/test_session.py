"""Shards of a minibatch, and what happens to all processes when one of them fails."""

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
from base.distributed.session import NCCL_TIMEOUT, _explain, _fresh_store, _limit_nccl
from base.errors import ProjectError
from tests.base.distributed.two_processes import ended, start_two


@pytest.mark.parametrize("name", ["set_timeout", "_set_default_timeout"])
def test_only_collectives_on_cuda_end_after_half_an_hour(name):
    limits = {}

    class Backend:
        def __init__(self, device):
            setattr(self, name, lambda timeout: limits.update({device.type: timeout}))

    class Group:
        _get_backend = staticmethod(Backend)

    _limit_nccl(Group())
    assert limits == {"cuda": NCCL_TIMEOUT}
    assert NCCL_TIMEOUT.total_seconds() == 1800


def shards_of(total, processes):
    return [Shard(total, rank, processes) for rank in range(processes)]


@pytest.mark.parametrize(("total", "processes"), [(9, 2), (8, 2), (7, 3), (3, 3), (5, 1)])
def test_each_image_is_in_one_shard_and_the_average_of_shards_is_the_mean(total, processes):
    images = torch.arange(total)
    parts = [images[shard.part] for shard in shards_of(total, processes)]
    assert sorted(torch.cat(parts).tolist()) == images.tolist()
    assert all(
        shard.counts and len(part)
        for shard, part in zip(shards_of(total, processes), parts, strict=True)
    )
    losses = torch.rand(total, dtype=torch.float64)
    averaged = (
        sum(shard.mean(losses[shard.part]) for shard in shards_of(total, processes)) / processes
    )
    assert float(averaged) == pytest.approx(float(losses.mean()), rel=1e-12)


@pytest.mark.parametrize("total", [1, 2])
def test_fewer_images_than_processes_are_computed_by_all_and_counted_once(total):
    losses = torch.rand(total)
    for shard in shards_of(total, 3):
        assert shard.copied
        assert torch.equal(losses[shard.part], losses)
        assert float(shard.mean(losses)) == float(losses.mean())
        assert shard.counts == (shard.rank == 0)
    own = torch.cat([torch.arange(total)[shard.own] for shard in shards_of(total, 3)])
    assert own.tolist() == list(range(total)), "each image has one owner"


def test_draws_do_not_depend_on_the_number_of_processes():
    whole = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    for shard in shards_of(7, 3):
        drawn = ShardedGenerator(torch.Generator().manual_seed(1), shard).draw(torch.randn, (2,))
        assert torch.equal(drawn, whole[shard.part])


def test_one_process_computes_everything():
    with distributed_session(training=True):
        assert shard_of(5) == Shard(5, 0, 1)
        assert (all_gather_object("a"), all_reduce_max(3), from_primary(lambda: 7)) == (["a"], 3, 7)


def test_a_fresh_store_has_no_values_of_dead_processes():
    store = dist.HashStore()
    store.set("asks 1", "token of a dead process")
    store.set("asks 2", "token of another")
    with ThreadPoolExecutor(3) as pool:
        # Rank 0 comes first and finds only the tokens of dead processes
        met = [pool.submit(_fresh_store, store, number, 3) for number in range(3)]
        parts = [part.result(timeout=200) for part in met]
    parts[0].set("key", "new")
    assert [part.get("key") for part in parts] == [b"new"] * 3
    with ThreadPoolExecutor(3) as pool:
        again = [
            part.result(timeout=200)
            for part in [pool.submit(_fresh_store, store, number, 3) for number in range(3)]
        ]
    assert not again[1].check(["key"]), "the next attempt has another prefix"


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/NCCLUtils.cpp:94, invalid usage"
    " (run with NCCL_DEBUG=WARN for details)\n"
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
            "the processes cannot communicate: NCCL error in: ",
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
        ),
        (
            f"{GLOO}Timed out waiting 18ms for recv\nException raised from f at a.cpp:1",
            "the processes cannot",
            "18ms for recv",
        ),
        ("", "the processes cannot communicate: ", "DistBackendError"),
    ],
)
def test_only_the_end_of_a_process_is_reported_as_such(said, beginning, end):
    sentence = _explain(dist.DistBackendError(said))
    assert sentence.startswith(beginning)
    assert sentence.endswith(end)
    assert "\n" not in sentence


def test_the_cause_of_a_failed_connection_is_kept(monkeypatch):
    cause = dist.DistBackendError(NCCL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr("base.distributed.session._fresh_store", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with (
        pytest.raises(ProjectError, match="rank 1: the processes cannot communicate") as caught,
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


def test_if_one_process_fails_all_end_with_its_exit_code(tmp_path):
    (tmp_path / "script.py").write_text(FAILS_ALONE)
    codes, errors = ended(start_two(tmp_path / "script.py"))
    assert codes == [4, 4]
    assert errors[1].splitlines()[-1] == "error: only here an image is broken"
    assert "another process" not in errors[0], "only one process reports the error"
