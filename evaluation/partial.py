"""Files that keep verdicts until their report is written, so that an interruption loses none."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from attacks.attack import Attack
from base.distributed import rank, world_size
from evaluation.identity import DIGITS
from evaluation.report import describe_attack


def partial_file(
    target: Path, digests: Mapping[str, str], attack: Attack, settings: Sequence[Any]
) -> Path:
    """Return the file beside the report `target` that keeps this process's verdicts, and make its
    folder.

    Its name is a digest of everything that the verdicts depend on: the `digests` of weights and
    images (see `evaluation_digests`), the attack, and the plain values `settings`. So a file with
    other verdicts is never continued.
    """
    kind = f"{type(attack).__module__}.{type(attack).__qualname__}"
    values = (digests, *settings, kind, describe_attack(attack), rank(), world_size())
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.stem}.{digest[:DIGITS]}.partial.npz")


def remove_partials(target: Path) -> None:
    """Remove the verdicts and adversarial images kept for `target`, after its report is written;
    also those of interrupted attempts with another number of processes or other settings."""
    for suffix in ("npz", "images"):
        name = f".{escape(target.stem)}.{'[0-9a-f]' * DIGITS}.partial.{suffix}"
        for partial in target.parent.glob(name):
            # Every process removes all files, and another one may have been faster.
            partial.unlink(missing_ok=True)
