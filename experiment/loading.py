"""What every evaluation of a checkpoint begins with: checkpoint and config -> config, test images, model."""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.checkpoint import find_checkpoint, load_checkpoint, load_weights
from base.command_line import set_overrides
from base.config.config import Config
from base.config.files import (
    Override,
    merge,
    merge_layers,
    override_layers,
    read_layers,
    run_imports,
    validate,
    validate_layers,
)
from base.config.imports import changes, imported_for
from base.config.origins import Layer
from base.errors import CheckpointError, ConfigError, DataError
from base.launch import own_device
from base.ranks import rank
from base.registry import lookup
from base.resuming import recorded_imports
from base.runtime import (
    autocast,
    choose_precision,
    determinism_explained,
    keep_freed_memory,
    set_determinism,
)
from data_loader import DATA_LOADERS
from data_loader.own_images import build_loader
from data_loader.splits import some_of_every_class
from experiment import build

logger = logging.getLogger(__name__)

ORIGINAL_MEAN, ORIGINAL_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""CIFAR-10's, which the original ConvNorm's attack scripts normalise by, whatever the data set; its
checkpoints hold none."""

TOLD_BY_NO_KEY = {
    "oni_rule": (
        "oni_conv", "paper", "original",
        "as the original ConvNorm's code has it;"
        " --set arch.args.oni_rule=paper if this project trained it",
    ),
    "shortcut_input": (
        "preact_resnet18", "activated", "activated",
        "as robust_overfitting and AWP have it;"
        " --set arch.args.shortcut_input=raw for fast_adversarial and GradAlign",
    ),
}  # fmt: skip
"""Arguments of `arch.args` that make another network of the same weights: the type that has the
argument, its value in a checkpoint of this project that is silent, its value in another code's
file, and why."""

EVALUATED = ("name", "seed", "n_gpu", "num_classes", "imports", "arch", "data_loader", "adversarial", "pgd_attack", "system")
"""The sections of a config that evaluation needs; whatever else is in it (label noise, schedules) does not matter here."""


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint, ready to be examined.

    Attributes:
        file: the checkpoint.
        config: the part of its config (or of the one named instead) that matters for an evaluation.
        device: where model and images are.
        loader: the test images, or the part of them that was asked for.
        model: with the checkpoint's weights, in evaluation mode.
        assumed: what was taken for what where the checkpoint does not say it: what about -> a
            sentence, for reports.
    """

    file: Path
    config: Config
    device: torch.device
    loader: BaseDataLoader
    model: BaseModel
    assumed: dict[str, str]

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes in the config's precision."""
        return autocast(self.device, choose_precision(self.config.system.precision, self.device))

    @property
    def described(self) -> str:
        """The network and the checkpoint's place, in a few words."""
        args = self.config.arch.args
        kind = f"{self.config.arch.type}, {args.conv_layer_type}, {args.norm_layer_type}"
        return f"{kind}, {'/'.join(self.file.parts[-2:])}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What every report says of its model: the file, what the pixels are normalised by, and
        what was assumed."""
        return {
            "checkpoint": str(self.file),
            "normalization": {"mean": _plain(self.model.mean), "std": _plain(self.model.std)},
            "assumed": self.assumed,
        }

    @property
    def data(self) -> str:
        """The data set's folder; where it has none, its loader's name."""
        return self.config.data_loader.args.data_dir or self.config.data_loader.type


def load_evaluation(
    arguments: argparse.Namespace, overrides: Iterable[Override] = (), *, limit: int | None = None, batch_size: int = 250
) -> Evaluation:
    """Config, test images and model of the checkpoint that an `evaluation_parser`'s arguments name.

    The config is that of `-c`, or else the checkpoint's own, with `--set` and then `overrides`. The checkpoint's mean and std
    are taken where it has them. What neither says is assumed, printed and kept in
    `Evaluation.assumed`. Determinism and number of threads are set as the config says.

    Args:
        arguments: parsed.
        overrides: more config values, of a script's own flags.
        limit: take that many test images only, the first of every class.
        batch_size: of the loader.

    Raises:
        ConfigError, CheckpointError, DataError: one of the three cannot be had, or they do not fit each other.
    """
    file = find_checkpoint(arguments.checkpoint)
    checkpoint = load_checkpoint(file, arguments.weights)
    config = _config(
        checkpoint, file, arguments.config, [*set_overrides(arguments.set), *overrides], arguments.imports
    )
    config, untold = _with_untold(config, checkpoint, str(file))
    set_determinism(config.system.deterministic, config.system.num_threads)
    device = own_device(config)
    keep_freed_memory(device)
    loader, normalization = _test_images(config, checkpoint, device)
    loader = some_of_every_class(loader, limit or loader.n_samples)
    loader.batch_size = batch_size
    model, fitted = _model(config, loader, checkpoint, file, device, ema=arguments.ema)
    # a normalization in the file comes last and wins
    assumed = untold | normalization | checkpoint.get("assumed", {}) | fitted
    if rank() == 0:
        for about, sentence in assumed.items():
            print(f"assumed: {about}: {sentence}")
    return Evaluation(file, config, device, loader, model, assumed)


def _plain(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


@torch.no_grad()
def predict(model: nn.Module, loader: BaseDataLoader, autocast: Callable[[], AbstractContextManager]) -> tuple[Tensor, Tensor]:
    """What the model, in its present mode, says about every image: labels and predicted classes, int64 `(N,)` on the CPU, in
    the order of the loader; -1 is predicted where logits are NaN."""
    labels, predictions = [], []
    for images, truth in tqdm(loader, desc="predicting", disable=None, leave=False):
        with autocast():
            logits = model(images)
        labels.append(truth.cpu())
        no_answer = logits.isnan().any(dim=1)
        predictions.append(logits.argmax(dim=1).masked_fill(no_answer, -1).cpu())
    return torch.cat(labels), torch.cat(predictions)


def _config(
    checkpoint: Mapping[str, Any],
    file: Path,
    config_file: str | None,
    overrides: list[Override],
    imports: Iterable[str],
) -> Config:
    """The config's part that matters for an evaluation, with the command line's values. Own code is
    imported that `config_file` or `imports` name."""
    layers = read_layers(config_file) if config_file else []
    recorded, own = run_imports(layers, imports)
    if config_file:
        source = config_file
    elif "config" in checkpoint:
        layers, source = [Layer(str(file), checkpoint["config"])], str(file)
        recorded = recorded_imports(checkpoint["config"], file)
        needed = {code.name: code for code in [*imported_for(recorded, source), *own]}
        own = list(needed.values())
    else:
        raise ConfigError(f"-c CONFIG: required, as {file} holds no config of this project")
    for warning in changes(recorded, own):
        logger.warning(warning)
    adversarial = merge_layers(layers)[0].get("adversarial", {})
    before = adversarial.get("norm", "linf") if isinstance(adversarial, dict) else "linf"
    if dict(overrides).get("adversarial.norm", before) != before:
        # sizes of the other norm mean nothing in this one
        sizes = {"adversarial": {"epsilon": None, "step_size": None}, "pgd_attack": {"step": None}}
        layers = [*layers, Layer(source, sizes)]
    config = validate_layers([*layers, *override_layers(overrides)], own, source)
    kept = {key: value for key, value in config.dump().items() if key in EVALUATED}
    trainer = {"adv_clip_eps": config.trainer.adv_clip_eps, "do_adv": config.trainer.do_adv}
    return validate({**kept, "trainer": {**trainer, "monitor": "off"}}, source)


def _with_untold(
    config: Config, checkpoint: Mapping[str, Any], source: str
) -> tuple[Config, dict[str, str]]:
    """The config with the values of `TOLD_BY_NO_KEY` that it leaves open, and a sentence about each
    that is assumed: the checkpoint's own config tells them, or else whether it is this
    project's."""
    saved: Any = checkpoint
    for section in ("config", "arch", "args"):
        saved = saved.get(section) if isinstance(saved, dict) else None
    saved, assumed = saved if isinstance(saved, dict) else {}, {}
    for name, (owner, own, foreign, why) in TOLD_BY_NO_KEY.items():
        args = config.arch.args
        if owner not in (config.arch.type, args.conv_layer_type) or getattr(args, name) is not None:
            continue
        value = saved.get(name, own)
        if "schema_version" not in checkpoint and name not in saved:
            value = foreign
            assumed[f"arch.args.{name}"] = f"{value}, {why}"
        config = validate(merge(config.dump(), {"arch": {"args": {name: value}}}), source)
    return config, assumed


def _test_images(
    config: Config, checkpoint: Mapping[str, Any], device: torch.device
) -> tuple[BaseDataLoader, dict[str, str]]:
    """The test images, with the mean and std of the model, and a sentence about those where they
    are assumed."""
    args = config.data_loader.args.model_dump(exclude_none=True) | {"validation_split": 0.0, "num_batches": 0}
    name, assumed = config.data_loader.type, {}
    told = "mean" in checkpoint or ("mean" in args and "std" in args)
    if "mean" in checkpoint:
        args |= {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    make = lookup(DATA_LOADERS, name, "data_loader.type")
    training = build_loader(name, make, {**args, "device": device})
    if not told:
        untold, assumed["normalization"] = _untold_normalization(training, config, checkpoint)
        training.mean, training.std = (tuple(args.get(key, untold[key])) for key in ("mean", "std"))
    loader = training.test_loader()
    if loader.n_samples == 0:
        raise DataError(f"{args.get('data_dir')}: the test set is empty")
    known = checkpoint.get("class_names")
    if known is not None and list(known) != list(loader.class_names):
        there, trained = ", ".join(loader.class_names), ", ".join(known)
        raise DataError(f"{args.get('data_dir')}: has the classes {there}; the model was trained on {trained}")
    return loader, assumed


def _untold_normalization(
    training: BaseDataLoader, config: Config, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, tuple[float, ...]], str]:
    """Mean and std for a file that holds none, under a config that leaves them open, and a sentence
    about them.

    They are those of the data set, as in the original's standard training, and CIFAR-10's for a
    data set without published ones; where images are not of three channels, the mean and std of the
    training images. The original's adversarial training normalises by CIFAR-10's
    whatever the data set, and on CIFAR-100 does so a second time, after its loader has normalised
    by CIFAR-100's and a clamp to [0, 1].
    """
    original = "monitor_best" in checkpoint
    channels = training.image_shape[0]
    if channels != len(ORIGINAL_MEAN):
        sentence = (
            "the checkpoint holds no mean and std: normalising by those of the training images;"
            f" --set data_loader.args.mean=[...] --set data_loader.args.std=[...] ({channels}"
            " values each) for others"
        )
        return {"mean": training.mean, "std": training.std}, sentence
    mean, std = training.default_mean, training.default_std
    twice = original and config.trainer.do_adv and mean not in (None, ORIGINAL_MEAN)
    follows = "training does"
    if mean is None or std is None or twice:
        mean, std = ORIGINAL_MEAN, ORIGINAL_STD
        follows = "attack scripts do"
    whose = "CIFAR-10" if mean == ORIGINAL_MEAN else config.data_loader.type
    sentence = f"the checkpoint holds no mean and std: normalising by those of {whose}"
    if original:
        sentence += f", as the original's {follows}"
    if twice:
        sentence += "; its adversarial training on CIFAR-100 normalises twice, which no mean and"
        sentence += " std can stand for"
    choice = "--set data_loader.args.mean=[R,G,B] --set data_loader.args.std=[R,G,B]"
    return {"mean": mean, "std": std}, f"{sentence}; {choice} for others"


def _model(
    config: Config, loader: BaseDataLoader, checkpoint: Mapping[str, Any], file: Path, device: torch.device, *, ema: bool
) -> tuple[BaseModel, dict[str, str]]:
    """The model, and what was assumed to fit the weights to it."""
    model = build.build_experiment_model(config, loader, device)
    if ema and "ema_state_dict" not in checkpoint:
        raise CheckpointError(f"--ema: {file} holds no averaged weights (trainer.ema_decay was not set)")
    assumed = load_weights(model, checkpoint["ema_state_dict" if ema else "state_dict"], file)
    _check_images_fit(model.eval(), config, loader, device)
    return model, assumed


def _check_images_fit(
    model: BaseModel, config: Config, loader: BaseDataLoader, device: torch.device
) -> None:
    """Ask the network about one image of the test set's shape.

    Raises:
        DataError: it cannot take such images: too small, or of other channels.
    """
    channels, height, width = loader.image_shape
    try:
        with torch.no_grad(), determinism_explained():
            model(torch.zeros(1, channels, height, width, device=device))
    except (RuntimeError, ValueError) as error:
        place = config.data_loader.args.data_dir or config.data_loader.type
        what = f"images of {width}x{height} pixels with {channels} channels"
        raise DataError(
            f"{place}: {what}, which {config.arch.type} cannot take: {str(error).splitlines()[0]}"
        ) from None
