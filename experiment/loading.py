"""Checkpoint -> model, with or without its test images."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
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
from base.config.tree import merge, value_at
from base.device import kernels_explained
from base.distributed import is_primary
from base.errors import CheckpointError, ConfigError, DataError
from base.registry import attribute_of, lookup
from base.run_folder.names import CONFIG
from base.text import first_line
from data_loader import DATA_LOADERS
from data_loader.data_loaders import CIFAR10_MEAN, CIFAR10_STD
from data_loader.own_images import build_loader
from data_loader.splits import some_of_every_class
from experiment import build, build_attacks
from experiment.evaluation import Evaluation, check_class_names, prepare_machine
from experiment.own_evaluation import evaluation_of_network, flags_named
from experiment.own_network import network_explained

logger = logging.getLogger(__name__)


def load_evaluation(
    arguments: argparse.Namespace,
    overrides: Iterable[Override] = (),
    *,
    limit: int | None = None,
    batch_size: int = 250,
) -> Evaluation:
    """Load the checkpoint, or the user's own network, that a command line names, and test images.

    It prints assumptions, and sets determinism and the number of threads as the config says.

    Args:
        arguments: parsed by an `evaluation_parser` and checked by `check_evaluation_outputs`.
        overrides: config values of the command's other flags, which take precedence over `--set`.
        limit: the number of test images, the first of every class; None for all.
        batch_size: of the loader.

    Raises:
        ConfigError, CheckpointError, DataError: network, weights or images cannot be read, or
            they do not fit each other.
    """
    options: dict[str, Any] = {
        "overrides": [*set_overrides(arguments.set), *overrides],
        "imports": arguments.imports,
        "weights": arguments.weights,
    }
    if arguments.model is None:
        evaluation = evaluation_of_checkpoint(
            arguments.checkpoint, config_file=arguments.config, ema=arguments.ema, **options
        )
    else:
        with network_explained(arguments.model):
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
    loader = some_of_every_class(evaluation.loader, limit or evaluation.loader.n_samples)
    loader.batch_size = batch_size
    evaluation = replace(evaluation, loader=loader)
    if arguments.model is not None:
        # A broken file among the user's images has to be found before the work begins.
        with flags_named():
            loader.prepare()
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
) -> Evaluation:
    """Load the model of a checkpoint, and the test images of its config.

    Mean and std come from the checkpoint, if it has them.

    Args:
        checkpoint: the file, or a run folder, which stands for its best model.
        config_file: the config; None for the one in the checkpoint.
        overrides: config values that replace the file's.
        imports: the user's own code to import, as `--imports` names it, in addition to what
            `config_file` names.
        weights: the name of one of several sets of weights in a file of other code.
        ema: load the averaged weights.

    Raises:
        ConfigError, CheckpointError, DataError: config, checkpoint or images cannot be read, or
            they do not fit each other.
    """
    file = find_checkpoint(checkpoint)
    contents = load_checkpoint(file, weights)
    # The images come last, because reading them can take longer than everything before.
    config = _evaluation_config(contents, file, config_file, list(overrides), imports)
    config, assumed_args = _with_assumed_args(config, contents, str(file))
    device = prepare_machine(config)
    loader, assumed_normalization = _test_images(config, contents, device)
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
            # Later entries win: what the file says about its normalization replaces a guess.
            "assumed": {
                **assumed_args,
                **assumed_normalization,
                **contents.get("assumed", {}),
                **fitted,
            },
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
    """Load the model of a run or checkpoint, in evaluation mode. Its data set is not needed.

        model = load_model("saved/quickstart/20260101-120000-000000")
        logits = model(images)  # (B, C, H, W) in [0, 1] -> (B, classes)

    Args:
        run_or_checkpoint: a run folder, which stands for its best model, or a checkpoint file.
        ema: load the averaged weights.
        device: of the model; None for the CPU.
        imports: files and modules of your own that the checkpoint asks for. Code that is not listed
            here is not run.

    Raises:
        CheckpointError: the checkpoint does not exist, does not name its network (files of other
            projects do not), or asks for code that is not among `imports`.
        ConfigError: its config cannot be used, or `imports` cannot be imported.
    """
    file = find_checkpoint(find_run(run_or_checkpoint))
    checkpoint = load_checkpoint(file)
    if "config" not in checkpoint:
        checkpoint = {**checkpoint, "config": _config_beside(file, checkpoint)}
    config = _evaluation_config(checkpoint, file, None, [], imports)
    config, _ = _with_assumed_args(config, checkpoint, str(file))
    if "mean" in checkpoint:
        normalization = {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    else:
        channels = config.arch.args.in_channels or len(CIFAR10_MEAN)
        if channels != len(CIFAR10_MEAN):
            raise CheckpointError(f"{file}: holds no mean and std for {channels} channels")
        make = lookup(DATA_LOADERS, config.data_loader.type, "data_loader.type")
        normalization, _ = _assumed_normalization(make, channels, config, checkpoint)
    classes = config.arch.args.num_classes or config.num_classes
    if classes is None:
        classes = len(checkpoint.get("class_names", ()))
    if not classes:
        raise CheckpointError(f"{file}: does not say how many classes its network has")
    config = build.with_shape(config, classes, len(normalization["mean"]))
    # The weights that are drawn here are replaced at once. Drawing them must not change the
    # caller's generators: `torch.manual_seed` seeds those of the CPU and of all CUDA devices.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        model = build.build_completed_model(
            config, **normalization, device=torch.device(device or "cpu")
        )
    load_weights(model, _weights_of(checkpoint, file, ema), file)
    return model.eval()


def _config_beside(file: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config beside a checkpoint of the original ConvNorm, which holds none itself.

    Raises:
        CheckpointError: the file is not the original's, or has no config beside it.
    """
    beside = file.with_name(CONFIG)
    if "monitor_best" not in checkpoint or not beside.is_file():
        raise CheckpointError(
            f"{file}: holds no config of this project, so its network is unknown:"
            " build it with models.build_model and load the weights with"
            " base.checkpoint.load_weights"
        )
    # The data is not read, but the placeholder in the published configs would be refused.
    return merge(read_tree(beside), {"data_loader": {"args": {"data_dir": str(file.parent)}}})


def _weights_of(checkpoint: Mapping[str, Any], file: Path, ema: bool) -> dict[str, Tensor]:
    if not ema:
        return checkpoint["state_dict"]
    if "ema_state_dict" not in checkpoint:
        raise CheckpointError(
            f"--ema: {file} holds no averaged weights (trainer.ema_decay was not set)"
        )
    return checkpoint["ema_state_dict"]


def _plain(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def _evaluation_config(
    checkpoint: Mapping[str, Any],
    file: Path,
    config_file: str | Path | None,
    overrides: list[Override],
    imports: Iterable[str | Path],
) -> Config:
    """Return the config of an evaluation, with the command line's values.

    It imports the code that `config_file` and `imports` name.
    """
    layers = read_layers(config_file) if config_file else []
    recorded, own = run_imports(layers, imports)
    if config_file:
        source = str(config_file)
    elif "config" in checkpoint:
        source = str(file)
        layers = [Layer(source, checkpoint["config"])]
        # Reading a checkpoint must not run code, so `imports` has to name what it asks for.
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
        # The sizes in the config are in units of its own norm.
        sizes = {"adversarial": {"epsilon": None, "step_size": None}, "pgd_attack": {"step": None}}
        layers = [*layers, Layer(source, sizes)]
    if "pgd_attack.type" in dict(overrides) and isinstance(attack, dict):
        dropped = build_attacks.keys_of_other_attack(attack, dict(overrides)["pgd_attack.type"])
        layers = [*layers, Layer(source, {"pgd_attack": dropped})]
    return validate_layers([*layers, *override_layers(overrides)], own, source)


def _with_assumed_args(
    config: Config, checkpoint: Mapping[str, Any], source: str
) -> tuple[Config, dict[str, str]]:
    """Fill in arguments of the network that neither the config nor the names of the weights say.

    These are the arguments `untold` (see `base.registry.MODELS`). They come from the config in the
    checkpoint, or else depend on whether this project wrote the checkpoint.

    Returns:
        The config, and a sentence about each argument that is assumed.
    """
    saved = value_at(checkpoint, "config.arch.args")
    if not isinstance(saved, dict):
        saved = {}
    assumed = {}
    args, chosen = config.arch.args, config.arch.chosen
    for choice in args.choices:
        part = chosen[choice.key]
        untold = attribute_of(choice.table[part], "untold", {})
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
    """Return the test images with the model's mean and std, and a sentence if these are assumed."""
    args = config.data_loader.args.model_dump(exclude_none=True)
    # Only the test set is used, so nothing is held out.
    args |= {"validation_split": 0.0, "num_batches": 0}
    name = config.data_loader.type
    assumed = {}
    known = "mean" in checkpoint or ("mean" in args and "std" in args)
    if "mean" in checkpoint:
        args |= {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    make = lookup(DATA_LOADERS, name, "data_loader.type")
    # The test set takes its classes, mean and std from the loader of the training images.
    training = build_loader(name, make, {**args, "device": device})
    if not known:
        channels = training.image_shape[0]
        normalization, assumed["normalization"] = _assumed_normalization(
            training, channels, config, checkpoint
        )
        training.mean = tuple(args.get("mean", normalization["mean"]))
        training.std = tuple(args.get("std", normalization["std"]))
    loader = training.test_loader()
    if loader.n_samples == 0:
        raise DataError(f"{args.get('data_dir')}: the test set is empty")
    check_class_names(checkpoint, loader.class_names, str(args.get("data_dir")))
    return loader, assumed


def _assumed_normalization(
    training: Any, channels: int, config: Config, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, tuple[float, ...]], str]:
    """Return mean and std for a checkpoint and a config that hold none, and a sentence about them.

    They are the data set's published ones, as in the original's standard training, or CIFAR-10's if
    the data set has none. For images that do not have three channels, they are computed from the
    training images. The original's adversarial training always normalizes by CIFAR-10's. On
    CIFAR-100 it normalizes twice: its loader by CIFAR-100's, and after a clamp to [0, 1] its
    trainer by CIFAR-10's.

    Args:
        training: the loader of the training images, or its class if they have three channels.
        channels: of the images.
        config: of the evaluation.
        checkpoint: the contents of the checkpoint.
    """
    original = "monitor_best" in checkpoint
    # Published values exist for color images only.
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
        sentence += (
            "; its adversarial training on CIFAR-100 normalizes twice,"
            " which no mean and std can stand for"
        )
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
    """Return the model with the checkpoint's weights, and the assumptions of loading them."""
    config = build.completed_config(config, loader)
    model = build.build_completed_model(config, mean=loader.mean, std=loader.std, device=device)
    assumed = load_weights(model, _weights_of(checkpoint, file, ema), file)
    # Without this, images that do not fit would fail inside the first attack.
    _check_test_images_fit(model.eval(), config, loader, device)
    return model, assumed


def _check_test_images_fit(
    model: BaseModel, config: Config, loader: BaseDataLoader, device: torch.device
) -> None:
    """Check that the network accepts an image of the test set's shape.

    Raises:
        DataError: the images are too small, or have another number of channels.
    """
    channels, height, width = loader.image_shape
    try:
        with torch.no_grad(), kernels_explained(device):
            model(torch.zeros(1, channels, height, width, device=device))
    except (RuntimeError, ValueError, TypeError) as error:
        place = config.data_loader.args.data_dir or config.data_loader.type
        what = f"images of {width}x{height} pixels with {channels} channels"
        raise DataError(
            f"{place}: {what}, which {config.arch.type} cannot take: {first_line(error)}"
        ) from None
