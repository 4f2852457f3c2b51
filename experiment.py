"""Experiment: the one place that knows every room. Config -> loaders, model, optimiser, trainer -> run folder.

    experiment = Experiment.from_config(load_config("configs/quickstart.json"))
    result = experiment.run()
"""

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer
from base.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, load_weights
from base.config import Config
from base.config_files import Override, merge, override, read_tree, validate
from base.errors import CheckpointError, ConfigError
from base.optimization import Schedule, build_optimizer, check_optimization
from base.registry import lookup
from base.resuming import refuse_other_experiment
from base.run_folder import create_run_folder, describe, logging_to, package_versions, record_environment, write_json
from base.runtime import autocast, choose_device, choose_precision, seed_global_generators, set_determinism
from base.tracking import start_trackers, tell
from data_loader import DATA_LOADERS
from data_loader.label_noise import LabelNoise, describe_transitions
from models import build_model
from models.losses import LOSSES
from models.metrics import METRICS
from models.ocnn import penalty
from trainer.evaluate import evaluate
from trainer.trainer import Trainer

logger = logging.getLogger(__name__)

HELD_OUT_BY_DEFAULT = 0.1


@dataclass
class Experiment:
    """Everything one config describes, assembled and ready to run. Assembling writes nothing.

    Attributes:
        config: the resolved config.
        train_loader: augmented minibatches of the training subset.
        validation_loader: held-out images; None where the config holds out nothing.
        test_loader: the test set, looked at only after training.
        model: on its device, weights drawn from the config's seed.
        optimizer: over the model's parameters.
        schedule: of its learning rate.
        precision: `"fp32"` or `"bf16"`.
    """

    config: Config
    train_loader: Any
    validation_loader: BaseDataLoader | None
    test_loader: BaseDataLoader
    model: BaseModel
    optimizer: Optimizer
    schedule: Schedule
    precision: str

    @classmethod
    def from_config(cls, config: Config) -> "Experiment":
        """Check the optimisation, read the data, build the model and its optimiser.

        Raises:
            ConfigError, DataError: one line that names the key or file.
        """
        check_optimization(config.optimizer, config.lr_scheduler)
        set_determinism(config.system.deterministic, config.system.num_threads)
        device = choose_device(config.system.device, config.n_gpu)
        train_loader = build_data_loader(config, device)
        validation_loader, test_loader = train_loader.split_validation(), train_loader.test_loader()
        for loader in filter(None, (train_loader, validation_loader, test_loader)):
            loader.prepare()
        model = build_experiment_model(config, train_loader, device)
        optimizer = build_optimizer(config.optimizer, model)
        epochs, batches = config.trainer.epochs, len(train_loader)
        schedule = Schedule(config.lr_scheduler, optimizer, epochs, batches, validation_loader is not None)
        precision = choose_precision(config.system.precision, device)
        return cls(config, train_loader, validation_loader, test_loader, model, optimizer, schedule, precision)

    def run(self, run_dir: str | None = None) -> dict[str, Any]:
        """Train into a new run folder and return what `result.json` holds."""
        folder = create_run_folder(self.config.trainer.save_dir, self.config.name, run_dir)
        return self._run(self.build_trainer(folder))

    @classmethod
    def resume(cls, path: str, config_file: str | None = None, overrides: Iterable[Override] = ()) -> dict[str, Any]:
        """Continue the run of a checkpoint, in its folder, with its config, and return what `result.json` holds.

        Args:
            path: a checkpoint file, or a run folder, whose newest checkpoint is taken.
            config_file: values that replace those of the run, where they do not change what is learnt.
            overrides: likewise, single values.

        Raises:
            CheckpointError: there is no checkpoint, or it belongs to other data or another model.
            ConfigError: a replaced value would make it another experiment.
        """
        file = find_checkpoint(path, prefer=LAST)
        checkpoint = load_checkpoint(file)
        if "config" not in checkpoint:
            raise CheckpointError(f"{file}: holds no config (ConvNorm's own format): it can be evaluated, not resumed")
        tree = merge(checkpoint["config"], read_tree(config_file) if config_file else {})
        config = validate(override(tree, overrides), config_file or str(file))
        refuse_other_experiment(checkpoint["config"], config, file)
        experiment = cls.from_config(config)
        loader = experiment.train_loader
        same_pixels = np.allclose([*loader.mean, *loader.std], [*checkpoint["mean"], *checkpoint["std"]], rtol=0, atol=1e-6)
        if loader.fingerprint() != checkpoint["fingerprint"] or not same_pixels:
            raise CheckpointError(f"{file}: was trained on other images or labels than data_loader.args.data_dir now holds")
        trainer = experiment.build_trainer(file.parent)
        trainer.resume(checkpoint, file)
        return experiment._run(trainer, resumed=True)

    def _run(self, trainer: BaseTrainer, resumed: bool = False) -> dict[str, Any]:
        folder, progress = trainer.folder, trainer.progress
        with logging_to(folder / "info.log", self.config.trainer.verbosity):
            self._describe(folder, resumed)
            if resumed:
                logger.info("resumed after %d epochs and %d batches", progress.epochs_done, progress.batches_done)
            else:
                seed_global_generators(self.config.seed, "training")
            trainer.trackers = start_trackers(self.config, folder, progress.history)
            try:
                if self.config.system.compile:
                    self.model.compile()
                trainer.train()
                result = self._conclude(trainer)
                tell(trainer.trackers, lambda tracker: tracker.log_result(result))
            finally:
                tell(trainer.trackers, lambda tracker: tracker.close())
        return result

    def build_trainer(self, folder: Path) -> BaseTrainer:
        """The trainer that the config asks for, which will write into `folder`."""
        config = self.config
        return Trainer(
            loss=LOSSES[config.train_loss],
            metrics=self._metrics(),
            penalty=ocnn_penalty(config),
            config=config,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            train_loader=self.train_loader,
            validation_loader=self.validation_loader,
            evaluate=partial(self.evaluate, description="validating"),
            precision=self.precision,
            folder=folder,
            metadata={
                "config": config.dump(),
                "mean": list(self.train_loader.mean),
                "std": list(self.train_loader.std),
                "class_names": list(self.train_loader.class_names),
                "fingerprint": self.train_loader.fingerprint(),
                "versions": package_versions(),
            },
        )

    def evaluate(self, model: BaseModel, loader: BaseDataLoader, description: str = "testing") -> dict[str, float]:
        """Mean loss and accuracies (fractions) of `model` on `loader`."""
        device = next(model.parameters()).device
        return evaluate(
            model,
            loader,
            loss=LOSSES[self.config.val_loss],
            metrics=self._metrics(),
            autocast=lambda: autocast(device, self.precision),
            description=description,
        )

    def _metrics(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The config's metrics, and always the two that results are reported in."""
        return {name: METRICS[name] for name in dict.fromkeys(["top1", "top5", *self.config.metrics])}

    def _describe(self, folder: Path, resumed: bool) -> None:
        """Write what the run is, before it begins: config, environment, labels."""
        loader, counts = self.train_loader, self._counts()
        write_json(folder / "config.json", self.config.dump())
        record_environment(folder, resumed)
        labels = loader.label_arrays()
        np.savez_compressed(folder / "labels.npz", **labels)
        logger.info("run folder %s", folder)
        logger.info(
            "%s with %d parameters on %s (%s); %d training, %d validation, %d test images of %d classes",
            self.config.arch.type, self.model.num_parameters(), next(self.model.parameters()).device, self.precision,
            *counts.values(), loader.num_classes,
        )  # fmt: skip
        if counts["n_val"] and self.config.data_loader.args.validation_split == 0:
            logger.warning("validation_split is 0, but val_ values are watched: 10 % of every class is held out")
        noise = loader.noise_report()
        if noise is not None:
            logger.info("label noise: %s", ", ".join(f"{key} {value}" for key, value in noise.items() if value is not None))
            for line in describe_transitions(labels["transition_matrix"], loader.class_names):
                logger.info("label noise: %s", line)

    def _counts(self) -> dict[str, int]:
        """How many images there are to train on, to validate and to test."""
        held_out = self.validation_loader.n_samples if self.validation_loader else 0
        n_train = len(self.train_loader.label_arrays()["train_index"])  # of which num_batches may take fewer in an epoch
        return {"n_train": n_train, "n_val": held_out, "n_test": self.test_loader.n_samples}

    def _conclude(self, trainer: BaseTrainer) -> dict[str, Any]:
        """Test the last and the best model, write `result.json`."""
        folder, progress = trainer.folder, trainer.progress
        best = last = self.evaluate(self.model, self.test_loader)
        if progress.best_epoch != progress.epochs_done or progress.batches_done > 0:
            load_weights(self.model, load_checkpoint(folder / BEST)["state_dict"], folder / BEST)
            best = self.evaluate(self.model, self.test_loader)
        log = progress.history[progress.best_epoch - 1]
        result = {
            **{f"test_{name}": value for name, value in best.items()},
            **{f"last_test_{name}": value for name, value in last.items()},
            "val_top1": log.get("val_top1"),
            **{key: value for key, value in log.items() if key.startswith("val_clean_")},
            "best_epoch": progress.best_epoch,
            "epochs": progress.epochs_done,
            "train_seconds": progress.train_seconds,
            "images_per_second": progress.images_seen / progress.train_seconds,
            **self._counts(),
            "parameters": self.model.num_parameters(),
            "seed": self.config.seed,
        }
        write_json(folder / "result.json", result)
        logger.info("done: %s", describe(result))
        return result


def build_data_loader(config: Config, device: torch.device) -> Any:
    """The training loader of a config. With a `val_` monitor and no validation split, a tenth of every class is held out."""
    settings, args = config.trainer, config.data_loader.args.model_dump(exclude_none=True)
    watches_validation = "val_" in settings.monitor or "val_" in (config.lr_scheduler.monitor or "")
    if watches_validation and args["validation_split"] == 0:
        args["validation_split"] = HELD_OUT_BY_DEFAULT
    kind = "sym" if settings.sym else "asym" if settings.asym else "file" if settings.noise_file else "none"
    noise = LabelNoise(
        kind=kind,
        percent=settings.percent,
        law=settings.noise_law,
        file=settings.noise_file,
        key=settings.noise_key,
        on_validation=settings.noisy_validation,
    )
    augmentation = config.augmentation
    return lookup(DATA_LOADERS, config.data_loader.type, "data_loader.type")(
        **args,
        seed=config.seed,
        subset_percent=settings.subset_percent,
        noise=noise,
        crop_padding=augmentation.crop_padding,
        flip=augmentation.flip,
        cutout=augmentation.cutout,
        device=device,
    )


def build_experiment_model(config: Config, loader: BaseDataLoader, device: torch.device) -> BaseModel:
    """The config's model for the loader's classes, with the loader's mean and std, on the device."""
    arch = config.arch.model_dump(exclude_none=True)
    asked = config.arch.args.num_classes or config.num_classes
    if asked is not None and asked != loader.num_classes:
        raise ConfigError(f"arch.args.num_classes: {asked}, but {config.data_loader.type} has {loader.num_classes} classes")
    arch["args"]["num_classes"] = loader.num_classes
    seed_global_generators(config.seed, "weights")
    model = build_model(arch, mean=loader.mean, std=loader.std).to(device)
    if config.system.channels_last:
        model = model.to(memory_format=torch.channels_last)
    refuse_unfit_images(model, loader, config.arch.type)
    return model


def refuse_unfit_images(model: BaseModel, loader: BaseDataLoader, name: str) -> None:
    """Try one forward pass in training mode, on a copy, with the smallest batch that will occur (two images are enough).

    Raises:
        ConfigError: the network cannot take images of that size, or so few.
    """
    count = min(2, loader.n_samples % loader.batch_size or loader.batch_size)
    images = torch.zeros(count, *loader.image_shape, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            deepcopy(model).train()(images)
    except (RuntimeError, ValueError) as error:
        size = f"{loader.image_shape[2]}x{loader.image_shape[1]}"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"arch.type: {name} cannot be trained on batches of {count} images of {size}: {reason}") from None


def ocnn_penalty(config: Config) -> Callable[[nn.Module], Tensor] | None:
    """OCNN's weighted penalty, where the config asks for it."""
    if not config.trainer.OCNN:
        return None
    return lambda model: config.trainer.lamb_ocnn * penalty(model)
