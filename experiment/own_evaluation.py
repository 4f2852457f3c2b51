"""The evaluation of a network of the user's own on the images of a folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.checkpoint import find_checkpoint, load_checkpoint, load_weights
from base.config import Config, Override
from base.config.files import override_layers, validate_layers
from base.config.imports import import_own_code, requests_of_flag
from base.config.origins import Layer, origin_of_override
from base.config.section import lies_in
from base.errors import ConfigError, DataError
from base.seeding import seed_global_generators
from data_loader.datasets import LabeledImages
from data_loader.folder_test_set import read_test_images, unshuffled_loader, with_channels
from experiment.evaluation import Evaluation, check_class_names, prepare_machine
from experiment.own_network import Normalized, build_network, count_logits

OWN_SETTINGS = ("adversarial", "pgd_attack", "system", "seed")
"""Config keys and sections that say how a network is measured."""

FLAGS_OF_KEYS = {
    "data_loader.args.data_dir": "--data",
    "data_loader.args.image_size": "--image_size",
}
"""Config keys in messages -> the flags that set them for a network of the user's own."""

HOW_TO_CHOOSE = "--model and --model_args"
"""The flags that choose the network, for the message if the weights do not fit it."""


def evaluation_of_network(
    model: str,
    data: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | Path] = (),
    weights: str | None = None,
) -> Evaluation:
    """Build a network of the user's own, and read the test images of a folder.

    Args:
        model: the function that returns the network, `FILE.py:NAME` or `MODULE:NAME`; see
            `own_network.build_network`.
        data: the folder; see `data_loader.folder_test_set.read_test_images`.
        model_args: keyword arguments of the function.
        checkpoint: a file with the network's weights, in any form that
            `base.checkpoint.foreign_weights` knows; None if the function loads them itself.
        mean, std: the pixels are normalized by these before the network gets them, a number in
            `[0, 1]` for each channel; None if the network normalizes them itself.
        image_size: side that images are resized and cropped to; None if all have one size.
        overrides: config values of `OWN_SETTINGS`.
        imports: the user's own code to import, as `--imports` names it.
        weights: the name of one of several sets of weights in the file.

    Raises:
        ConfigError, CheckpointError, DataError: network, weights or images cannot be read, or
            they do not fit each other.
        Exception: whatever the network's own code raises; see `own_network.network_explained`.
    """
    import_own_code(requests_of_flag(imports))
    config = _config_of_flags(data, overrides)
    device = prepare_machine(config)
    with flags_named():
        part = read_test_images(data, image_size)
    # A function that loads no weights draws them. They have to be the same in every process.
    seed_global_generators(config.seed, "weights")
    network = build_network(model, model_args or {})
    file = None if checkpoint is None else find_checkpoint(checkpoint)
    assumed: dict[str, str] = {}
    if file is not None:
        contents = load_checkpoint(file, weights)
        check_class_names(contents, part.class_names, str(data))
        fitted = load_weights(network, contents["state_dict"], file, HOW_TO_CHOOSE)
        assumed |= contents.get("assumed", {}) | fitted
    normalization = None
    if mean is not None and std is not None:
        network = Normalized(network, mean, std)
        by = "a module Normalized around the network"
        normalization = {"mean": list(mean), "std": list(std), "by": by}
    else:
        assumed["normalization"] = (
            "the network gets pixels in [0, 1] as they are; --mean and --std normalize them for it"
        )
    # Not what they return, as a user's own methods may return nothing
    network.to(device)
    # A module of torch.export has no modes
    with suppress(NotImplementedError):
        network.eval()
    channels = part.images.shape[0]
    part = _fitting_images(network, part, device, None if mean is None else len(mean), str(data))
    if part.images.shape[0] != channels:
        assumed["channels"] = (
            f"the first image file has {channels}; the network gets {part.images.shape[0]}"
        )
    return Evaluation(
        model=network,
        loader=unshuffled_loader(part, device),
        config=config,
        device=device,
        source=model,
        place=model,
        described=model if file is None else f"{model}, {file.name}",
        data=str(data),
        provenance={
            "model": model,
            "model_args": dict(model_args or {}),
            "checkpoint": None if file is None else str(file),
            "normalization": normalization,
            "assumed": assumed,
        },
    )


def _fitting_images(
    network: nn.Module,
    part: LabeledImages,
    device: torch.device,
    channels: int | None,
    data: str,
) -> LabeledImages:
    """Return the images with as many channels as the network takes.

    Gray images can be given three equal channels.

    Raises:
        DataError: the network cannot take the images, or has another number of classes.
        TypeError, ValueError: the network does not return logits.
    """
    found = part.images.shape[0]
    if channels is not None:
        candidates = [channels]
    elif found == 1:
        candidates = [1, 3]
    else:
        candidates = [found]
    failures: list[DataError] = []
    for number in candidates:
        images = with_channels(part, number)
        try:
            logits = count_logits(network, images.images.shape, device)
        except DataError as error:
            failures.append(error)
            continue
        classes = len(part.class_names)
        if logits != classes:
            raise DataError(
                f"--data {data}: has {classes} classes, but the network of --model gives"
                f" {logits} logits"
            )
        return images
    raise DataError(f"--data {data}: {failures[0]}") from failures[0]


def _config_of_flags(data: str | Path, overrides: Iterable[Override]) -> Config:
    """Return the config that a network of the user's own is measured with."""
    given = list(overrides)
    for override in given:
        if not lies_in(override[0], OWN_SETTINGS):
            raise ConfigError(
                f"{origin_of_override(override)}: has no effect on the network of --model;"
                f" expected a key of {', '.join(OWN_SETTINGS)}"
            )
    loader = {"type": "ImageFolderDataLoader", "args": {"data_dir": str(data)}}
    # A monitor would hold out validation images.
    tree = {"data_loader": loader, "trainer": {"monitor": "off"}}
    return validate_layers([Layer("--data", tree), *override_layers(given)], [], "--data")


@contextmanager
def flags_named() -> Iterator[None]:
    """Make errors about the images name the flag that sets them, instead of a config key."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for key, flag in FLAGS_OF_KEYS.items():
            message = message.replace(key, flag)
        raise DataError(message) from error
