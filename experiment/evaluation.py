"""Evaluation: a network and the images that it is measured on, for every command that measures
one."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from base.config import Config
from base.device import autocast, choose_precision, set_determinism
from base.distributed.launch import own_device
from base.errors import DataError
from data_loader.splits import some_of_every_class


@dataclass(frozen=True)
class Evaluation:
    """A network and the images that it is measured on.

    Attributes:
        model: in evaluation mode, on `device`.
        loader: the test images, or the part of them that was asked for.
        config: how it is measured: the sections `adversarial`, `pgd_attack` and `system`, and the
            seed. Of a network of the user's own, `arch` and everything else means nothing.
        device: where model and images are.
        source: what reports call the model: the file of a checkpoint, or the word after `--model`.
        described: the network and where it comes from, in a few words, for titles.
        data: the data set's folder; where it has none, its loader's name.
        provenance: what every report says of its model: the checkpoint, what the pixels are
            normalized by, and what was assumed.
        run_folder: the run folder that was named, which reports go into; None for everything else.
    """

    model: nn.Module
    loader: BaseDataLoader
    config: Config
    device: torch.device
    source: str
    described: str
    data: str
    provenance: dict[str, Any]
    run_folder: Path | None = None

    @property
    def assumed(self) -> dict[str, str]:
        """What was assumed because nothing says it: what about -> a sentence."""
        return self.provenance["assumed"]

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes in the config's precision."""
        return autocast(self.device, choose_precision(self.config.system.precision, self.device))

    def weights_digest(self) -> str:
        """SHA-256 of the model's parameters and buffers, hexadecimal."""
        digest = hashlib.sha256()
        for value in (*self.model.parameters(), *self.model.buffers()):
            content = value.detach().cpu().contiguous().flatten()
            digest.update(content.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def prepare_machine(config: Config) -> torch.device:
    """Set this process up as the config says; its device."""
    set_determinism(config.system.deterministic, config.system.num_threads)
    return own_device(config)


def some_images(loader: BaseDataLoader, limit: int | None, batch_size: int) -> BaseDataLoader:
    """The first `limit` images of every class, taken together; all of them where it is None."""
    loader = some_of_every_class(loader, limit or loader.n_samples)
    loader.batch_size = batch_size
    return loader


def check_class_names(checkpoint: Mapping[str, Any], found: Sequence[str], data: str) -> None:
    """Refuse images of other classes than a checkpoint names.

    Raises:
        DataError: naming both.
    """
    known = checkpoint.get("class_names")
    if known is not None and list(known) != list(found):
        there, trained = ", ".join(found), ", ".join(known)
        raise DataError(f"{data}: has the classes {there}; the model was trained on {trained}")
