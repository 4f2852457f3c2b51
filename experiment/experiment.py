"""Experiment: config -> loaders, model, optimiser, trainer -> run folder. With `build` and `final_test`, knows every room.

experiment = Experiment.from_config(load_config("configs/quickstart.json"))
result = experiment.run()
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from attacks.threat_model import as_written
from base.agreement import agreed, config_facts, data_facts
from base.atomic import replacing
from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, Validate
from base.config.config import Config
from base.config.files import Override
from base.errors import CheckpointError, ConfigError
from base.launch import own_device
from base.optimization import Schedule, build_optimizer, check_optimization
from base.progress import not_finite
from base.ranks import from_first, rank, started_processes, world_size
from base.resuming import SavedRun, saved_run
from base.run_folder import (
    logging_to,
    new_run_folder,
    only_run_in,
    package_versions,
    record_environment,
    write_json,
)
from base.runtime import (
    autocast,
    choose_precision,
    determinism_explained,
    keep_freed_memory,
    memory_explained,
    seed_global_generators,
    set_determinism,
)
from base.tracking import start_trackers, tell
from data_loader.label_noise import describe_transitions
from data_loader.splits import some_of_every_class
from experiment import build, build_attacks
from experiment.final_test import conclude
from trainer.robust_validation import RobustValidation

logger = logging.getLogger(__name__)


@dataclass
class Experiment:
    """Everything one config describes, assembled and ready to run. Assembling writes nothing.

    Attributes:
        config: the resolved config, with what the data set decides.
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
    def from_config(cls, config: Config, begun: bool = False) -> "Experiment":
        """Check the optimisation, read the data, build the model and its optimiser.

        Several processes make sure that they have the same config, code and data (see
        `base.agreement`), before any of them waits for another.

        Args:
            config: the resolved config.
            begun: it is that of a run that is continued; see `check_optimization`.

        Raises:
            ConfigError, DataError: one line that names the key or file, or what differs between processes.
        """
        if started_processes() != world_size():
            raise ConfigError("torchrun: the processes have not met: train inside `with base.ranks.ranks(training=True):`")
        device, train_loader, validation_loader, test_loader = agreed(
            lambda: cls._read(config, begun),
            lambda read: {
                **config_facts(config),
                **data_facts(training=read[1], validation=read[2], test=read[3]),
            },
        )
        config = build.completed_config(config, train_loader)
        model = build.build_experiment_model(config, train_loader, device)
        build.refuse_unfit_images(model, train_loader, config.arch.type)
        optimizer = build_optimizer(config.optimizer, model)
        epochs, batches = config.trainer.epochs, len(train_loader)
        schedule = Schedule(config.lr_scheduler, optimizer, epochs, batches, validation_loader is not None)
        precision = choose_precision(config.system.precision, device)
        return cls(config, train_loader, validation_loader, test_loader, model, optimizer, schedule, precision)

    @staticmethod
    def _read(config: Config, begun: bool) -> tuple[torch.device, Any, BaseDataLoader | None, BaseDataLoader]:
        """This process's device, and its training, validation and test images."""
        check_optimization(config.optimizer, config.lr_scheduler, begun)
        set_determinism(config.system.deterministic, config.system.num_threads)
        device = own_device(config)
        keep_freed_memory(device)
        train_loader = build.build_data_loader(config, device)
        train_loader.shared_out = config.augmentation.mixup_alpha == 0  # mixup's partners are anywhere in the minibatch
        validation_loader, test_loader = train_loader.split_validation(), train_loader.test_loader()
        for loader in filter(None, (train_loader, validation_loader, test_loader)):
            loader.prepare()
        build.refuse_too_few_images(config, train_loader, validation_loader, test_loader)
        return device, train_loader, validation_loader, test_loader

    def run(self, run_dir: str | None = None) -> dict[str, Any]:
        """Train into a new run folder and return what `result.json` holds."""
        with ExitStack() as stack:
            place = new_run_folder(self.config.trainer.save_dir, self.config.name, run_dir)
            folder = from_first(lambda: stack.enter_context(place))
            return self._run(self.build_trainer(folder))

    @classmethod
    def resume(
        cls,
        path: str,
        config_file: str | None = None,
        overrides: Iterable[Override] = (),
        imports: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Continue the run of a checkpoint, in its folder, with its config, and return what `result.json` holds.

        Args:
            path, config_file, overrides, imports: see `base.resuming.saved_run`.

        Raises:
            CheckpointError: there is not a checkpoint, or it belongs to other data or another model.
            ConfigError: a replaced value would make it another experiment.
        """
        return cls.continue_run(saved_run(path, config_file, overrides, imports))

    @classmethod
    def continue_run(cls, run: SavedRun) -> dict[str, Any]:
        """Continue a run and return what `result.json` holds; see `resume`.

        Raises:
            CheckpointError: it belongs to other data.
            ConfigError: another process trains in its folder.
        """
        folder = run.file.parent
        with ExitStack() as stack:
            from_first(lambda: stack.enter_context(only_run_in(folder)))
            experiment = cls.from_config(run.config, begun=True)
            experiment.refuse_other_data(run)
            trainer = experiment.build_trainer(folder)
            # a resume that is refused leaves everything as it was
            best = trainer.resume(run.checkpoint, run.file)
            return experiment._run(trainer, resumed_with=[run.set_aside_damaged(), *run.changed_code, best])

    def refuse_other_data(self, run: SavedRun) -> None:
        """Refuse to continue a run on other images, labels or classes.

        Raises:
            CheckpointError: the checkpoint's are others. Those from before there were digests of images are compared by mean
                and standard deviation of the training images only.
        """
        loader, checkpoint = self.train_loader, run.checkpoint
        different = []
        if loader.fingerprint() != checkpoint["fingerprint"]:
            different.append("labels")
        numbers, saved = [*loader.mean, *loader.std], [*checkpoint["mean"], *checkpoint["std"]]
        if len(numbers) != len(saved) or not np.allclose(numbers, saved, rtol=0, atol=1e-6):
            different.append("mean or std of the pixels")
        saved = checkpoint.get("image_fingerprints")
        if saved is not None:
            now = loader.image_fingerprints()
            different += [part for part in sorted(now | saved) if now.get(part) != saved.get(part)]
        names = checkpoint["class_names"]
        if list(loader.class_names) != list(names):
            pairs = enumerate(zip_longest(names, loader.class_names))
            number, (there, here) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
            different.append(f"class {number} is {there!r} there, {here!r} here")
        if different:
            place = "data_loader.args.data_dir"
            if self.config.trainer.noise_file is not None:
                place += " (or trainer.noise_file)"
            raise CheckpointError(
                f"{run.file}: was trained on other images or labels than {place} now holds: {', '.join(different)}"
            )

    def _run(self, trainer: BaseTrainer, resumed_with: list[str | None] | None = None) -> dict[str, Any]:
        """Train and conclude; `resumed_with` are the warnings of a resume, None for a new run."""
        folder, progress, resumed = trainer.folder, trainer.progress, resumed_with is not None
        with logging_to(folder / "info.log", self.config.trainer.verbosity) if rank() == 0 else _silence():
            self._describe(folder, resumed)
            if resumed:
                for warning in filter(None, resumed_with):
                    logger.warning(warning)
                logger.info("resumed after %d epochs and %d batches", progress.epochs_done, progress.batches_done)
            else:
                # copies of a model shall not drop the same units
                seed_global_generators(self.config.seed, f"training {rank()}" if rank() else "training")
            trainer.trackers = start_trackers(self.config, folder, progress.history) if rank() == 0 else []
            try:
                if self.config.system.compile:
                    # training, validation, attacks and averaged weights each ask for their own code
                    torch._dynamo.config.recompile_limit = 64
                    self.model.compile()
                batch_size = self.config.data_loader.args.batch_size
                fitting = memory_explained("data_loader.args.batch_size", batch_size)
                with trainer.signals.caught(), determinism_explained(), fitting:
                    trainer.train()
                    counts = self._counts() | self._noise_rate()
                    result = conclude(trainer, self.test_loader, counts)
                tell(trainer.trackers, lambda tracker: tracker.log_result(result))
            finally:
                tell(trainer.trackers, lambda tracker: tracker.close())
        return result

    def build_trainer(self, folder: Path) -> BaseTrainer:
        """The trainer that the config asks for, which will write into `folder`."""
        return build.build_trainer(
            self.config,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            train_loader=self.train_loader,
            validate=self._validator(),
            precision=self.precision,
            folder=folder,
            metadata={
                "config": self.config.dump(),
                "mean": list(self.train_loader.mean),
                "std": list(self.train_loader.std),
                "class_names": list(self.train_loader.class_names),
                "fingerprint": self.train_loader.fingerprint(),
                "image_fingerprints": self.train_loader.image_fingerprints(),
                "versions": package_versions(),
            },
        )

    def _validator(self) -> Validate:
        """What is measured on the validation set after an epoch: loss and accuracies, in some epochs robust accuracy."""
        loader, robust = self.validation_loader, self.robust_validation
        if loader is None:
            return lambda model, epoch: {}
        clean = partial(build.evaluator(self.config, self.autocast), loader=loader.own_part(), description="validating")

        def validate(model: BaseModel, epoch: int) -> dict[str, float]:
            values = clean(model)
            if robust is None or not_finite(values):  # a model that has diverged is not attacked
                return values
            return {**values, **robust(model, epoch)}

        return validate

    @cached_property
    def robust_validation(self) -> RobustValidation | None:
        """The attack on a part of the validation set that the config asks for; None where it asks for none."""
        config, loader = self.config, self.validation_loader
        if loader is None or config.robust_validation_period == 0:
            return None
        return RobustValidation(
            some_of_every_class(loader, config.adversarial.validate_images).own_part(),
            build_attacks.pgd(config),
            build_attacks.fgsm(config) if config.adversarial_method == "fgsm" else None,
            period=config.robust_validation_period,
            epochs=config.trainer.epochs,
            seed=config.seed,
            autocast=self.autocast,
        )

    def autocast(self) -> Any:
        """The context of forward passes in the run's precision."""
        return autocast(next(self.model.parameters()).device, self.precision)

    def _describe(self, folder: Path, resumed: bool) -> None:
        """Write what the run is, before it begins: config, environment, labels."""
        loader, counts = self.train_loader, self._counts()
        layers = self.config.arch.args
        labels = loader.label_arrays()
        if rank() == 0:
            write_json(folder / "config.json", self.config.dump())
            for warning in record_environment(folder, resumed):
                logger.warning(warning)
            with replacing(folder / "labels.npz") as file:
                np.savez_compressed(file, **labels)
        logger.info("run folder %s", folder)
        logger.info(
            "%s (convolutions %s, norm %s) with %d parameters on %s (%s);"
            " %d training, %d validation, %d test images of %d classes",
            self.config.arch.type, layers.conv_layer_type, layers.norm_layer_type, self.model.num_parameters(),
            next(self.model.parameters()).device, self.precision,
            *counts.values(), loader.num_classes,
        )  # fmt: skip
        if world_size() > 1:
            logger.info("%d processes, each with its share of every minibatch", world_size())
        # a run that is continued has said it when it began
        for warning in () if resumed else self.config.warnings:
            logger.warning(warning)
        for remark in loader.remarks:
            logger.info("data set: %s", remark)
        validation_split = self.config.data_loader.args.validation_split
        if loader.names_validation and validation_split > 0:
            logger.warning(
                "validation_split has no effect: the data set names its validation images itself"
            )
        elif counts["n_val"] and not loader.names_validation and validation_split == 0:
            logger.warning("validation_split is 0, but validation is asked for: 10 % of every class is held out")
        if self.train_loader.n_samples < self.train_loader.batch_size:
            logger.warning(
                "data_loader.args.batch_size: %d is more than the %d training images: every minibatch holds all of them",
                self.train_loader.batch_size,
                self.train_loader.n_samples,
            )
        self._describe_adversary()
        noise = loader.noise_report()
        if noise is not None:
            logger.info("label noise: %s", ", ".join(f"{key} {value}" for key, value in noise.items() if value is not None))
            warning = loader.noise_warning()
            if warning:
                logger.warning("label noise: %s", warning)
            for line in describe_transitions(labels["transition_matrix"], loader.class_names):
                logger.info("label noise: %s", line)

    def _counts(self) -> dict[str, int]:
        """How many images there are to train on, to validate and to test."""
        held_out = self.validation_loader.n_samples if self.validation_loader else 0
        n_train = len(self.train_loader.label_arrays()["train_index"])  # of which num_batches may take fewer in an epoch
        return {"n_train": n_train, "n_val": held_out, "n_test": self.test_loader.n_samples}

    def _noise_rate(self) -> dict[str, float]:
        """The share of training labels that noise has changed; nothing without noise."""
        noise = self.train_loader.noise_report()
        return {} if noise is None else {"noise_rate": noise["train_rate"]}

    def _describe_adversary(self) -> None:
        config, robust = self.config, self.robust_validation
        threat = build_attacks.threat_model(config)
        radius = f"{threat.norm} {as_written(threat.epsilon, threat.norm)}"
        if config.adversarial_method != "none":
            epochs = config.adversarial.warmup_epochs
            growing = f", growing over the first {epochs} epochs" if epochs else ""
            logger.info("adversarial training: %s, %s%s", config.adversarial_method, radius, growing)
        if robust is not None:
            logger.info(
                "robust validation: PGD-%d, %s, on %d of %d validation images (the first of every class), every %d epochs",
                config.pgd_attack.K, radius, robust.n_samples, self.validation_loader.n_samples, robust.period,
            )  # fmt: skip
        elif config.adversarial_method != "none":
            logger.info(
                "no robust validation: %s", "nothing is held out" if config.robust_validation_period else "not asked for"
            )


@contextmanager
def _silence() -> Iterator[None]:
    """Meanwhile log messages go nowhere: rank 0 has the same ones."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
