"""The log messages at the start of a run: the model, the data, the attacks, and warnings."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attacks.threat_model import format_size
from base.base_trainer import BaseTrainer
from base.config import Config
from base.device import explain_device
from base.distributed import is_primary, world_size
from base.precision import precision_warning
from data_loader.label_noise import describe_transitions
from evaluation.report import title
from experiment import build_attacks
from trainer.adversarial_trainer import TrainerWithAdversary

if TYPE_CHECKING:
    from experiment.experiment import Experiment

logger = logging.getLogger(__name__)


def log_description(
    experiment: "Experiment", trainer: BaseTrainer, labels: Mapping[str, Any], resumed: bool
) -> None:
    """Log what an experiment trains, on which images, and what a user should know about it.

    Args:
        experiment: before its first step.
        trainer: its trainer.
        labels: the arrays of `labels.npz`.
        resumed: whether the run is continued. It then does not repeat the config's warnings.
    """
    _log_model(experiment)
    log_device(experiment.config, next(experiment.model.parameters()).device)
    if world_size() > 1:
        logger.info("%d processes, each with its shard of every minibatch", world_size())
    if not resumed:
        for warning in experiment.config.warnings:
            logger.warning(warning)
    _log_data(experiment)
    _log_attacks(experiment, trainer)
    _log_label_noise(experiment, labels)


def log_device(config: Config, device: torch.device) -> None:
    """Log why `system.device` `"auto"` is the CPU, and what its hardware lacks for the precision.

    It is a warning where this machine has a GPU that torch cannot use.
    """
    if not is_primary():
        return
    explained = None
    if config.system.device == "auto":
        explained = explain_device(device, config.n_gpu)
    if explained is not None:
        reason, has_gpu = explained
        level = logging.WARNING if has_gpu else logging.INFO
        logger.log(level, "system.device: auto takes the CPU: %s", reason)
    warning = precision_warning(config.system.precision, device)
    if warning is not None:
        logger.warning(warning)


def _log_model(experiment: "Experiment") -> None:
    arch = experiment.config.arch
    logger.info(
        "%s (convolutions %s, norm %s) with %d parameters on %s (%s);"
        " %d training, %d validation, %d test images of %d classes",
        arch.type,
        arch.args.conv_layer_type,
        arch.args.norm_layer_type,
        experiment.model.num_parameters(),
        next(experiment.model.parameters()).device,
        experiment.precision,
        *experiment.image_counts().values(),
        experiment.train_loader.num_classes,
    )


def _log_data(experiment: "Experiment") -> None:
    loader = experiment.train_loader
    for warning in loader.warnings:
        logger.warning(warning)
    for remark in loader.remarks:
        logger.info("data set: %s", remark)
    key = "data_loader.args.validation_split"
    split = experiment.config.data_loader.args.validation_split
    if loader.names_validation:
        if split > 0:
            logger.warning(
                "%s: %g has no effect, because the data set names its validation images", key, split
            )
    elif split == 0 and experiment.validation_loader is not None:
        # See `build_data_loader`.
        logger.warning(
            "%s: 0, but the config asks for validation: 10 %% of every class is held out", key
        )
    if loader.n_samples < loader.batch_size:
        logger.warning(
            "data_loader.args.batch_size: %d is more than the %d training images:"
            " every minibatch holds all of them",
            loader.batch_size,
            loader.n_samples,
        )


def _log_attacks(experiment: "Experiment", trainer: BaseTrainer) -> None:
    config = experiment.config
    robust = experiment.robust_validation
    if config.attacks_while_training:
        # A method of a user's own may attack in another way.
        threat = build_attacks.threat_model(config)
        attack = f"{threat.norm} {format_size(threat.epsilon, threat.norm)}"
        if isinstance(trainer, TrainerWithAdversary):
            attack = trainer.describe_training_attack()
        logger.info("adversarial training: %s, %s", config.adversarial_method, attack)
    if robust is not None:
        logger.info(
            "robust validation: %s, on %d of %d validation images (the first of every class),"
            " every %d epochs",
            title(robust.attack),
            robust.n_samples,
            experiment.validation_loader.n_samples,
            robust.period,
        )
    elif config.attacks_while_training:
        reason = "nothing is held out" if config.robust_validation_period else "not asked for"
        logger.info("no robust validation: %s", reason)


def _log_label_noise(experiment: "Experiment", labels: Mapping[str, Any]) -> None:
    loader = experiment.train_loader
    noise = loader.noise_report()
    if noise is None:
        return
    values = [f"{key} {value}" for key, value in noise.items() if value is not None]
    logger.info("label noise: %s", ", ".join(values))
    warning = loader.noise_warning()
    if warning:
        logger.warning("label noise: %s", warning)
    for line in describe_transitions(labels["transition_matrix"], loader.class_names):
        logger.info("label noise: %s", line)
