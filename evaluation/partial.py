"""Files that keep verdicts until their report is written, so that an interruption loses none."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from base.base_data_loader import BaseDataLoader
from base.distributed import rank, world_size
from evaluation.report import describe_attack

# The number of digits of a digest in the name of such a file.
DIGITS = 16


def partial_file(
    target: Path,
    model: nn.Module,
    loader: BaseDataLoader,
    attack: Attack,
    settings: Sequence[Any],
) -> Path:
    """Return the file beside the report `target` that keeps this process's verdicts, and make its
    folder.

    Its name is a digest of everything that the verdicts depend on: weights, images, attack, and the
    plain values `settings`. So a file with other verdicts is never continued.
    """
    # The first batch stands for the pixels of all: a change of preprocessing changes it, too.
    images, _ = next(iter(loader))
    digest = hash_tensors(
        [*model.parameters(), *model.buffers(), loader.positions, loader.labels, images]
    )
    kind = f"{type(attack).__module__}.{type(attack).__qualname__}"
    values = (*settings, kind, describe_attack(attack), rank(), world_size())
    digest.update(json.dumps(values, sort_keys=True).encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.stem}.{digest.hexdigest()[:DIGITS]}.partial.npz")


def hash_tensors(tensors: Iterable[Tensor]) -> "hashlib._Hash":
    """Return the SHA-256 of the tensors' bytes, to which more can be added."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # NumPy has no bfloat16, so the bytes are hashed.
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest


def remove_partials(target: Path) -> None:
    """Remove the verdicts and adversarial images kept for `target`, after its report is written;
    also those of interrupted attempts with another number of processes or other settings."""
    for suffix in ("npz", "images"):
        name = f".{escape(target.stem)}.{'[0-9a-f]' * DIGITS}.partial.{suffix}"
        for partial in target.parent.glob(name):
            # Every process removes all files, and another one may have been faster.
            partial.unlink(missing_ok=True)
