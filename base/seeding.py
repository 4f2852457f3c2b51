"""Seeds and generators: every draw is a pure function of a seed, a purpose and indices."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed that is a pure function of the arguments.

    Different arguments give unrelated seeds, so draws for one purpose never depend on how many were
    made for another.

    Args:
        seed: of the run.
        purpose: what is drawn, such as `"order"` or `"augmentation"`.
        indices: the epoch, the index of the batch or sample, and so on.
    """
    # Changing this changes the results of every published run; a test holds one value.
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU `torch.Generator` seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return a `numpy.random.Generator` seeded by `derived_seed`."""
    return np.random.default_rng(derived_seed(seed, purpose, *indices))


def seed_global_generators(seed: int, purpose: str) -> None:
    """Seed torch's global generators. Only weight initialization and dropout draw from them."""
    torch.manual_seed(derived_seed(seed, purpose))


def get_rng_state() -> dict[str, Any]:
    """Return the states of torch's global generators, which dropout draws from."""
    cuda = []
    # Asking for the states would initialize CUDA, also in a run on the CPU.
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `get_rng_state` returned, except those of devices that this machine
    does not have."""
    torch.set_rng_state(state["cpu"])
    for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
