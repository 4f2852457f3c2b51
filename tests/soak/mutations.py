"""Corrupt files byte by byte, as disks do, or value by value, as other programs do."""

from collections.abc import Iterator, MutableMapping, MutableSequence
from copy import deepcopy
from math import inf, nan
from random import Random
from typing import Any

import torch

Container = MutableMapping[Any, Any] | MutableSequence[Any]

ODD_VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**9,
    2**70,
    10**400,
    0.5,
    -0.5,
    inf,
    nan,
    "",
    "min",
    "line\nbreak\x1b[31m",
    b"bytes",
    [],
    [1],
    (),
    {},
    {"a": {"b": 1}},
    {0: 1},
)
"""Values that replace others."""


def mutated(data: bytes, random: Random) -> bytes:
    """Change, remove or double a few bytes, half of the time near the beginning."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        # A checkpoint's structure is near its beginning
        near = min(len(changed), 20_000) if random.random() < 0.5 else len(changed)
        place = random.randrange(near)
        match random.randrange(3):
            case 0:
                changed[place] = random.randrange(256)
            case 1:
                del changed[place : place + random.randrange(1, 20)]
            case 2:
                changed[place:place] = changed[place : place + random.randrange(1, 20)]
        changed = changed or bytearray(b"{")
    return bytes(changed)


def corrupted(contents: dict[str, Any], random: Random) -> dict[str, Any]:
    """Return a copy of a checkpoint's contents with one value lost, replaced or exchanged."""
    contents = deepcopy(contents)
    container, key = random.choice(list(_places(contents, random)))
    match random.randrange(4):
        case 0:
            del container[key]
        case 1:
            container[key] = _odd_tensor(container[key], random)
        case 2:
            container[key] = deepcopy(random.choice(ODD_VALUES))
        case 3:
            other = random.choice(list(_keys(container)))
            container[key], container[other] = container[other], container[key]
    return contents


def _places(contents: dict[str, Any], random: Random) -> Iterator[tuple[Container, Any]]:
    """Yield the containers on a random path into the contents, with the key that it takes."""
    container: Any = contents
    while isinstance(container, MutableMapping | MutableSequence) and len(container):
        key = random.choice(list(_keys(container)))
        yield container, key
        container = container[key]


def _keys(container: Container) -> Iterator[Any]:
    return iter(container) if isinstance(container, MutableMapping) else iter(range(len(container)))


def _odd_tensor(value: Any, random: Random) -> Any:
    """Return a tensor of another shape, type or content, or a tensor instead of another value."""
    if not isinstance(value, torch.Tensor):
        return torch.zeros(random.choice([(), (1,), (3, 3)]))
    return random.choice(
        [
            value.flatten()[:1],
            value[None],
            value.double(),
            value.to(torch.int64),
            value.to(torch.bool),
            torch.full_like(value, 0)
            if value.dtype == torch.uint8
            else torch.full_like(value, nan, dtype=torch.float32),
            torch.empty(0),
            value.flatten().to_sparse(),
            torch.complex(value.float(), value.float()),
        ]
    )
