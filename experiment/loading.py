"""Checkpoint -> model, with or without its test images; and what every evaluation begins with."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.checkpoint import find_checkpoint, load_checkpoint, load_weights
from base.checkpoint.find import find_run
from base.checkpoint.resume import recorded_imports
from base.command_line import set_overrides
from base.config import Config, Override, validate
from base.config.files import (
    merge_layers,
    override_layers,
    read_layers,
    read_tree,
    run_imports,
    validate_layers,
)
from base.config.imports import changes, imported_for
from base.config.origins import Layer
from base.config.tree import merge
from base.device import determinism_explained
from base.distributed import is_primary
from base.errors import CheckpointError, ConfigError, DataError
from base.registry import lookup, property_of
from base.run_folder.names import CONFIG
from base.text import first_line
from data_loader import DATA_LOADERS
from data_loader.data_loaders import CIFAR10_MEAN, CIFAR10_STD
from data_loader.own_images import build_loader
from experiment import build, build_attacks
from experiment.evaluation import Evaluation, check_class_names, prepare_machine, some_images
from experiment.evaluation_flags import check_network_flags
from experiment.own_evaluation import evaluation_of_network

logger = logging.getLogger(__name__)


EVALUATED = (
    "name",
    "seed",
    "n_gpu",
    "num_classes",
    "imports",
    "arch",
    "data_loader",
    "adversarial",
    "pgd_attack",
    "system",
)
"""The sections of a config that evaluation needs; whatever else is in it (label noise, schedules)
does not matter here."""


def load_evaluation(
    arguments: argparse.Namespace,
    overrides: Iterable[Override] = (),
    *,
    limit: int | None = None,
    batch_size: int = 250,
) -> Evaluation:
    """What the arguments of an `evaluation_parser` name: a checkpoint, or a network of the user's
    own.

    What was assumed is printed. Determinism and number of threads are set as the config says.

    Args:
        arguments: parsed.
        overrides: config values of a script's own flags, which come after `--set`.
        limit: take that many test images only, the first of every class.
        batch_size: of the loader.

    Raises:
        ConfigError, CheckpointError, DataError: network, weights or images cannot be read, or
            they do not fit each other.
    """
    check_network_flags(arguments)
    options: dict[str, Any] = {
        "overrides": [*set_overrides(arguments.set), *overrides],
        "imports": arguments.imports,
        "weights": arguments.weights,
        "limit": limit,
        "batch_size": batch_size,
    }
    if arguments.model is None:
        evaluation = evaluation_of_checkpoint(
            arguments.checkpoint, config_file=arguments.config, ema=arguments.ema, **options
        )
    else:
        evaluation = evaluation_of_network(
            arguments.model,
            arguments.data,
            model_args=dict(arguments.model_args),
            checkpoint=arguments.checkpoint,
            mean=arguments.mean,
            std=arguments.std,
            image_size=arguments.image_size,
            **options,
        )
    if is_primary():
        for about, sentence in evaluation.assumed.items():
            print(f"assumed: {about}: {sentence}")
    return evaluation


def evaluation_of_checkpoint(
    checkpoint: str | Path,
    *,
    config_file: str | Path | None = None,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | Path] = (),
    weights: str | None = None,
    ema: bool = False,
    limit: int | None = None,
    batch_size: int = 250,
) -> Evaluation:
    """The model of a checkpoint, and the test images of its config.

    Mean and std are the checkpoint's where it has them.

    Args:
        checkpoint: the file, or a run folder, which stands for its best model.
        config_file: the config; None for the checkpoint's own.
        overrides: config values that replace the file's.
        imports: the user's own code to import, as `--imports` names it, beside what `config_file`
            names.
        weights: which of several sets of weights in another code's file.
        ema: take the averaged weights.
        limit: take that many test images only, the first of every class.
        batch_size: of the loader.

    Raises:
        ConfigError, CheckpointError, DataError: one of the three cannot be read, or they do not
            fit each other.
    """
    file = find_checkpoint(checkpoint)
    contents = load_checkpoint(file, weights)
    config = _config(contents, file, config_file, list(overrides), imports)
    config, untold = _with_untold(config, contents, str(file))
    device = prepare_machine(config)
    loader, normalization = _test_images(config, contents, device)
    loader = some_images(loader, limit, batch_size)
    model, fitted = _model(config, loader, contents, file, device, ema=ema)
    args = config.arch.args
    return Evaluation(
        model=model,
        loader=loader,
        config=config,
        device=device,
        source=str(file),
        described=(
            f"{config.arch.type}, {args.conv_layer_type}, {args.norm_layer_type},"
            f" {'/'.join(file.parts[-2:])}"
        ),
        data=config.data_loader.args.data_dir or config.data_loader.type,
        provenance={
            "checkpoint": str(file),
            "normalization": {"mean": _plain(model.mean), "std": _plain(model.std)},
            # a normalization in the file comes last and wins
            "assumed": untold | normalization | contents.get("assumed", {}) | fitted,
        },
        run_folder=Path(checkpoint) if Path(checkpoint).is_dir() else None,
    )


def load_model(
    run_or_checkpoint: str | Path,
    *,
    ema: bool = False,
    device: str | torch.device | None = None,
    imports: Iterable[str | Path] = (),
) -> BaseModel:
    """The model of a run or checkpoint, in evaluation mode. Its data set is not needed.

        model = load_model("saved/quickstart/20260101-120000-000000")
        logits = model(images)  # (B, C, H, W) in [0, 1] -> (B, classes)

    Args:
        run_or_checkpoint: a run folder, which stands for its best model, or a checkpoint file.
        ema: take the averaged weights.
        device: where the model is; None for the CPU.
        imports: files and modules of your own that the checkpoint asks for. It runs none itself.

    Raises:
        CheckpointError: the checkpoint does not exist, does not name its network (files of other
            projects do not), or asks for code that is not among `imports`.
        ConfigError: its config cannot be used, or `imports` cannot be imported.
    """
    file = find_checkpoint(find_run(run_or_checkpoint))
    checkpoint = load_checkpoint(file)
    if "config" not in checkpoint:
        checkpoint = {**checkpoint, "config": _config_beside(file, checkpoint)}
    config = _config(checkpoint, file, None, [], imports)
    config, _ = _with_untold(config, checkpoint, str(file))
    if "mean" in checkpoint:
        normalization = {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    else:
        channels = config.arch.args.in_channels or len(CIFAR10_MEAN)
        if channels != len(CIFAR10_MEAN):
            raise CheckpointError(
                f"{file}: does not say by which mean and std its network normalizes"
            )
        make = lookup(DATA_LOADERS, config.data_loader.type, "data_loader.type")
        normalization, _ = _untold_normalization(make, channels, config, checkpoint)
    classes = config.arch.args.num_classes or config.num_classes
    if classes is None:
        classes = len(checkpoint.get("class_names", ()))
    if not classes:
        raise CheckpointError(f"{file}: does not say how many classes its network tells apart")
    config = build.with_shape(config, classes, len(normalization["mean"]))
    # the weights that it begins with are replaced, and the caller's generators are not ours
    with torch.random.fork_rng(devices=[]):
        model = build.build_network(config, **normalization, device=torch.device(device or "cpu"))
    load_weights(model, _weights_of(checkpoint, file, ema), file)
    return model.eval()


def _config_beside(file: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The config in the folder of a checkpoint of the original ConvNorm, which holds none itself.

    Raises:
        CheckpointError: there is none.
    """
    beside = file.with_name(CONFIG)
    if "monitor_best" not in checkpoint or not beside.is_file():
        raise CheckpointError(
            f"{file}: holds no config of this project, so nothing says what network it is of:"
            " build that with models.build_model, and fill it with base.checkpoint.load_weights"
        )
    # the folder of its data may be a placeholder
    return merge(read_tree(beside), {"data_loader": {"args": {"data_dir": str(file.parent)}}})


def _weights_of(checkpoint: Mapping[str, Any], file: Path, ema: bool) -> dict[str, Tensor]:
    if ema and "ema_state_dict" not in checkpoint:
        raise CheckpointError(
            f"--ema: {file} holds no averaged weights (trainer.ema_decay was not set)"
        )
    return checkpoint["ema_state_dict" if ema else "state_dict"]


def _plain(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def _config(
    checkpoint: Mapping[str, Any],
    file: Path,
    config_file: str | Path | None,
    overrides: list[Override],
    imports: Iterable[str | Path],
) -> Config:
    """The config's part that matters for an evaluation, with the command line's values. The code
    that `config_file` and `imports` name is imported."""
    layers = read_layers(config_file) if config_file else []
    recorded, own = run_imports(layers, imports)
    if config_file:
        source = str(config_file)
    elif "config" in checkpoint:
        layers, source = [Layer(str(file), checkpoint["config"])], str(file)
        recorded = recorded_imports(checkpoint["config"], file)
        needed = {code.name: code for code in [*imported_for(recorded, source), *own]}
        own = list(needed.values())
    else:
        raise ConfigError(f"-c CONFIG: required, as {file} holds no config of this project")
    for warning in changes(recorded, own):
        logger.warning(warning)
    merged = merge_layers(layers)[0]
    adversarial, attack = merged.get("adversarial", {}), merged.get("pgd_attack", {})
    before = adversarial.get("norm", "linf") if isinstance(adversarial, dict) else "linf"
    if dict(overrides).get("adversarial.norm", before) != before:
        # sizes of the other norm mean nothing in this one
        sizes = {"adversarial": {"epsilon": None, "step_size": None}, "pgd_attack": {"step": None}}
        layers = [*layers, Layer(source, sizes)]
    if "pgd_attack.type" in dict(overrides) and isinstance(attack, dict):
        left = build_attacks.other_attack(attack, dict(overrides)["pgd_attack.type"])
        layers = [*layers, Layer(source, {"pgd_attack": left})]
    config = validate_layers([*layers, *override_layers(overrides)], own, source)
    kept = {key: value for key, value in config.dump().items() if key in EVALUATED}
    trainer = {"adv_clip_eps": config.trainer.adv_clip_eps, "do_adv": config.trainer.do_adv}
    return validate({**kept, "trainer": {**trainer, "monitor": "off"}}, source)


def _with_untold(
    config: Config, checkpoint: Mapping[str, Any], source: str
) -> tuple[Config, dict[str, str]]:
    """The config with the arguments that it leaves open and that no key of the weights tells (see
    `untold` at `base.registry.MODELS`), and a sentence about each that is assumed: the checkpoint's
    own config tells them, or else whether it is this project's."""
    saved: Any = checkpoint
    for section in ("config", "arch", "args"):
        saved = saved.get(section) if isinstance(saved, dict) else None
    saved, assumed = saved if isinstance(saved, dict) else {}, {}
    args, chosen = config.arch.args, config.arch.chosen
    for choice in args.choices:
        part = chosen[choice.key]
        untold = property_of(choice.table[part], "untold", {})
        for key, (foreign, why) in untold.items():
            if args.get(key) is not None:
                continue
            value = saved.get(key, choice.arguments(part)[key].field.default)
            if "schema_version" not in checkpoint and key not in saved:
                value = foreign
                assumed[f"arch.args.{key}"] = f"{value}, {why}"
            config = validate(merge(config.dump(), {"arch": {"args": {key: value}}}), source)
    return config, assumed


def _test_images(
    config: Config, checkpoint: Mapping[str, Any], device: torch.device
) -> tuple[BaseDataLoader, dict[str, str]]:
    """The test images, with the mean and std of the model, and a sentence about those where they
    are assumed."""
    args = config.data_loader.args.model_dump(exclude_none=True) | {
        "validation_split": 0.0,
        "num_batches": 0,
    }
    name, assumed = config.data_loader.type, {}
    told = "mean" in checkpoint or ("mean" in args and "std" in args)
    if "mean" in checkpoint:
        args |= {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    make = lookup(DATA_LOADERS, name, "data_loader.type")
    training = build_loader(name, make, {**args, "device": device})
    if not told:
        channels = training.image_shape[0]
        untold, assumed["normalization"] = _untold_normalization(
            training, channels, config, checkpoint
        )
        training.mean, training.std = (tuple(args.get(key, untold[key])) for key in ("mean", "std"))
    loader = training.test_loader()
    if loader.n_samples == 0:
        raise DataError(f"{args.get('data_dir')}: the test set is empty")
    check_class_names(checkpoint, loader.class_names, str(args.get("data_dir")))
    return loader, assumed


def _untold_normalization(
    training: Any, channels: int, config: Config, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, tuple[float, ...]], str]:
    """Mean and std for a file that holds none, under a config that leaves them open, and a sentence
    about them.

    They are those of the data set, as in the original's standard training, and CIFAR-10's for a
    data set without published ones; where images are not of three channels, the mean and std of the
    training images. The original's adversarial training normalizes by CIFAR-10's
    whatever the data set, and on CIFAR-100 does so a second time, after its loader has normalized
    by CIFAR-100's and a clamp to [0, 1].

    Args:
        training: the training images; their class does where they have three channels.
        channels: of the images.
        config: of the evaluation.
        checkpoint: its contents.
    """
    original = "monitor_best" in checkpoint
    if channels != len(CIFAR10_MEAN):
        sentence = (
            "the checkpoint holds no mean and std: normalizing by those of the training images;"
            f" --set data_loader.args.mean=[...] --set data_loader.args.std=[...] ({channels}"
            " values each) for others"
        )
        return {"mean": training.mean, "std": training.std}, sentence
    mean, std = getattr(training, "default_mean", None), getattr(training, "default_std", None)
    twice = original and config.trainer.do_adv and mean not in (None, CIFAR10_MEAN)
    follows = "training does"
    if mean is None or std is None or twice:
        mean, std = CIFAR10_MEAN, CIFAR10_STD
        follows = "attack scripts do"
    whose = "CIFAR-10" if mean == CIFAR10_MEAN else config.data_loader.type
    sentence = f"the checkpoint holds no mean and std: normalizing by those of {whose}"
    if original:
        sentence += f", as the original's {follows}"
    if twice:
        sentence += "; its adversarial training on CIFAR-100 normalizes twice, which no mean and"
        sentence += " std can stand for"
    choice = "--set data_loader.args.mean=[R,G,B] --set data_loader.args.std=[R,G,B]"
    return {"mean": mean, "std": std}, f"{sentence}; {choice} for others"


def _model(
    config: Config,
    loader: BaseDataLoader,
    checkpoint: Mapping[str, Any],
    file: Path,
    device: torch.device,
    *,
    ema: bool,
) -> tuple[BaseModel, dict[str, str]]:
    """The model, and what was assumed to fit the weights to it."""
    model = build.build_experiment_model(config, loader, device)
    assumed = load_weights(model, _weights_of(checkpoint, file, ema), file)
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
    except (RuntimeError, ValueError, TypeError) as error:
        place = config.data_loader.args.data_dir or config.data_loader.type
        what = f"images of {width}x{height} pixels with {channels} channels"
        raise DataError(
            f"{place}: {what}, which {config.arch.type} cannot take: {first_line(error)}"
        ) from None
