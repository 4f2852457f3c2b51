"""Seeds and generators: every draw is a pure function of a seed, a purpose and indices."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that is a pure function of its arguments.

    `purpose` names what is drawn (`"order"`, `"augmentation"`), `indices` are the epoch, the batch
    or sample index and so on. Two different argument lists give unrelated seeds, so draws for one
    purpose never depend on how many were made for another."""
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A `numpy.random.Generator` seeded by `derived_seed`."""
    return np.random.default_rng(derived_seed(seed, purpose, *indices))


def seed_global_generators(seed: int, purpose: str) -> None:
    """Seed torch's global generators, from which only weight initialization and dropout draw."""
    torch.manual_seed(derived_seed(seed, purpose))


def get_rng_state() -> dict[str, Any]:
    """The states of torch's global generators, which dropout draws from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` returned; generators of devices that are not here are
    skipped."""
    torch.set_rng_state(state["cpu"])
    for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
