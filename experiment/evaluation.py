"""A network together with the images that it is measured on."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from base.config import Config
from base.distributed.launch import local_device
from base.errors import DataError
from base.machine import set_machine
from base.precision import autocast, choose_precision
from experiment.description import log_device


@dataclass(frozen=True)
class Evaluation:
    """A network and the images that it is measured on.

    Attributes:
        model: in evaluation mode, on `device`.
        loader: the test images.
        config: how it is measured: the sections `adversarial`, `pgd_attack` and `system`, and the
            seed. For a network of the user's own, all other sections are meaningless.
        device: of model and images.
        source: the name of the model in reports: the file of a checkpoint, or the value of
            `--model`.
        described: the network and its origin in a few words, for titles.
        data: the data set's folder, or the name of its loader if it has none.
        provenance: what every report says about its model: the checkpoint, the normalization of
            pixels, and assumptions.
        run_folder: the run folder that the user named, which reports are written into; otherwise
            None.
        place: the value of `--model`; None for a network of this project.
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
    place: str | None = None

    @property
    def assumed(self) -> dict[str, str]:
        """What had to be assumed, because no file says it: subject -> a sentence."""
        return self.provenance["assumed"]

    def autocast(self) -> AbstractContextManager:
        """Return the context of forward passes in the config's precision."""
        return autocast(self.device, choose_precision(self.config.system.precision, self.device))


def prepare_machine(config: Config) -> torch.device:
    """Set up this process as the config says, for the rest of the command; return its device.

    Rank 0 logs why `auto` is the CPU, and a warning if the hardware lacks the precision.
    """
    set_machine(config.system)
    device = local_device(config)
    log_device(config, device)
    return device


def check_class_names(checkpoint: Mapping[str, Any], found: Sequence[str], data: str) -> None:
    """Check that images have the classes that a checkpoint names, if it does.

    Raises:
        DataError: naming both.
    """
    trained = checkpoint.get("class_names")
    if trained is not None and list(trained) != list(found):
        raise DataError(
            f"{data}: has the classes {', '.join(found)};"
            f" the model was trained on {', '.join(trained)}"
        )
