"""Training from Python: `train`, `resume`, and `Experiment`, the parts that a config describes.

import experiment

result = experiment.train("configs/quickstart.json", {"trainer.epochs": 3})
result["test_top1"], result.folder
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, Validate
from base.checkpoint import has_checkpoint
from base.checkpoint.resume import SavedRun, saved_run
from base.config import Config, Override, load_config
from base.config.files import origins_named, override_layers, run_imports, validate_layers
from base.config.origins import Flag, Layer
from base.device import kernels_explained, memory_explained
from base.distributed import (
    distributed_session,
    from_primary,
    is_primary,
    rank,
    started_processes,
    world_size,
)
from base.distributed.agreement import Facts, config_facts, data_facts, prepare_on_all_ranks
from base.distributed.launch import launch, local_device
from base.errors import CheckpointError, ConfigError
from base.machine import machine_settings
from base.optim import Schedule, build_optimizer, check_optimization
from base.precision import autocast, choose_precision
from base.run_folder import folder as run_folder
from base.run_folder.environment import belongs_to_this_job, package_versions
from base.run_folder.logs import logging_to
from base.run_folder.names import INFO_LOG
from base.seeding import seed_global_generators
from base.text import counted
from base.tracking.start import start_trackers
from base.train_state import not_finite
from data_loader.own_images import check_first_batch
from data_loader.splits import some_of_every_class
from experiment import build, build_attacks
from experiment.description import log_description
from experiment.final_test import run_final_test
from trainer.robust_validation import RobustValidation

logger = logging.getLogger(__name__)


Overrides = Mapping[str, Any] | Iterable[Override]
"""Config values to replace: a mapping of dotted keys to Python values, or pairs of a key and its
value as text, as on a command line."""


@dataclass(frozen=True, eq=False)
class RunResult(Mapping[str, Any]):
    """The result of a run: a read-only mapping with the contents of its `result.json`.

    Attributes:
        folder: the run folder.
        values: the contents, by name, such as `test_top1`.
    """

    folder: Path
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return the values as a plain dictionary that JSON can hold."""
        return dict(self.values)


def train(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Overrides = (),
    run_dir: str | Path | None = None,
    *,
    imports: Iterable[str | Path] = (),
    check: Callable[[Config], None] | None = None,
    relaunch: bool = False,
) -> RunResult:
    """Train what a config describes, test it, and write a run folder.

    SIGINT (Ctrl-C, or the stop button of a notebook), SIGTERM and SIGHUP (a closed terminal) end
    the training after the current minibatch, with everything saved. Only the main thread receives
    signals. Under torchrun, all processes call this function with the same arguments. If torchrun
    restarts them after a failure (`--max-restarts`), the run continues from its last checkpoint in
    `run_dir`.

    The result does not depend on what the caller has set in torch, such as `torch.no_grad()`. Only
    the caller's number of threads counts, if `system.num_threads` is null. Afterwards all settings
    and torch's global generators are as they were.

    Args:
        config: a config file, a tree of JSON values like that of a file, or a resolved config.
        overrides: values that replace the config's, such as `{"trainer.epochs": 3, "arch.type":
            "resnet34"}`; None gives a key its default.
        run_dir: the run folder, new or empty; None makes `<trainer.save_dir>/<name>/<time>`.
        imports: files and modules of your own to import first, in addition to the config's, as
            `--imports` names them.
        check: called with the resolved config of a new run. It raises a `ConfigError` for a config
            that the caller does not want to train.
        relaunch: if `n_gpu` asks for several processes and torchrun has not started them, run this
            process's command line in that many processes, and exit with their code. This is for
            commands; without it such a config is an error.

    Returns:
        The contents of `result.json`, and the run folder.

    Raises:
        ConfigError: the config, or `run_dir`, cannot be used.
        DataError: images or labels are missing or broken.
        NonFiniteError: a number became infinite or NaN; the last checkpoint is intact.
        Stopped: a signal stopped the run; `resume` continues it.
    """
    with distributed_session(training=True):
        # torchrun repeats the same command line, whose run folder then already holds a run.
        if from_primary(lambda: _was_restarted(run_dir)):
            file = str(config) if isinstance(config, str | Path) else None
            return resume(run_dir, overrides, config_file=file, imports=imports, relaunch=relaunch)
        resolved = _resolve(config, overrides, imports)
        # An error of this run then names the file or the flag that the value came from.
        with origins_named(resolved):
            if check is not None:
                check(resolved)
            _check_processes(resolved, relaunch)
            return Experiment.from_config(resolved).run(run_dir)


def resume(
    path: str | Path,
    overrides: Overrides = (),
    *,
    config_file: str | Path | None = None,
    imports: Iterable[str | Path] = (),
    relaunch: bool = False,
) -> RunResult:
    """Continue a run in its folder, bit for bit as if it had not been interrupted.

    A finished run is only tested again.

    Args:
        path: a checkpoint, or a run folder, whose last undamaged checkpoint is used.
        overrides: values that replace those of the run's config; see `train`. They must not make it
            another experiment: `trainer.epochs` may change, `optimizer.args.lr` may not.
        config_file: a config file with such values. `overrides` take precedence.
        imports: files and modules of your own that the run needs. The code that its folder names is
            not run unless it is listed here.
        relaunch: see `train`.

    Returns:
        The contents of `result.json`, and the run folder.

    Raises:
        CheckpointError: no undamaged checkpoint was found, or it belongs to other data or another
            model.
        ConfigError: a replaced value would make it another experiment, or another process trains in
            the folder.
        DataError, NonFiniteError, Stopped: see `train`.
    """
    with distributed_session(training=True), ExitStack() as stack:
        saved = saved_run(str(path), config_file and str(config_file), _as_text(overrides), imports)
        stack.enter_context(origins_named(saved.config))
        _check_processes(saved.config, relaunch)
        # The folder stays locked until the run ends.
        stack.enter_context(run_folder.open(saved.file.parent))
        return Experiment.from_config(saved.config, resumed=True).run(saved=saved)


def _resolve(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Overrides,
    imports: Iterable[str | Path],
) -> Config:
    """Return the resolved config of `train`'s arguments."""
    settings = _as_text(overrides)
    if isinstance(config, str | Path):
        return load_config(config, settings, imports)
    if isinstance(config, Config):
        if not settings:
            # Dumping it and reading it again would lose the Comet key.
            return config
        config = config.dump()
    files = [Layer("config", dict(config))]
    _, own = run_imports(files, imports)
    return validate_layers([*files, *override_layers(settings)], own, "config")


def _as_text(overrides: Overrides) -> list[Override]:
    """Return overrides as pairs of a key and JSON text, as `--set` gives them."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    settings: list[Override] = []
    for key, value in overrides.items():
        try:
            text = json.dumps(value, default=_as_json)
            settings.append(Flag((key, text), f"overrides {key}={text}"))
        except (TypeError, ValueError):
            raise ConfigError(f"{key}: {value!r:.80} is not a value that JSON can hold") from None
    return settings


def _as_json(value: Any) -> Any:
    """Return a path as text, and a NumPy number as Python's."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _check_processes(config: Config, relaunch: bool) -> None:
    """Check that there are as many processes as `n_gpu` asks for.

    If there is only one and `relaunch` is true, the processes are started, and this function does
    not return.

    Raises:
        ConfigError: there is only one process, and `relaunch` is false.
    """
    # Under torchrun, its own flags say how many processes there are.
    if started_processes() > 1 or config.n_gpu <= 1:
        return
    if not relaunch:
        raise ConfigError(
            f"n_gpu: asks for {config.n_gpu} processes, but there is only one: train with"
            " train.py or under torchrun, or set n_gpu to 1"
        )
    launch(config)


def _was_restarted(run_dir: str | Path | None) -> bool:
    """Whether torchrun has restarted this job after it had saved a checkpoint in the run folder."""
    if run_dir is None:
        return False
    folder = Path(run_dir).expanduser()
    return has_checkpoint(folder) and belongs_to_this_job(folder)


@dataclass
class Experiment:
    """The parts that a config describes, ready to run.

    Attributes:
        config: the resolved config, completed with the data set's classes and channels.
        train_loader: augmented minibatches of the training subset.
        validation_loader: held-out images; None if the config holds out nothing.
        test_loader: the test set, which is used only after training.
        model: on its device, weights drawn from the config's seed.
        optimizer: over the model's parameters.
        schedule: of its learning rate.
        precision: `"fp32"`, `"tf32"` or `"bf16"`.
    """

    config: Config
    train_loader: BaseDataLoader
    validation_loader: BaseDataLoader | None
    test_loader: BaseDataLoader
    model: BaseModel
    optimizer: Optimizer
    schedule: Schedule
    precision: str
    _has_run: bool = field(default=False, init=False, repr=False)

    @classmethod
    def from_config(cls, config: Config, resumed: bool = False) -> "Experiment":
        """Check the config, read the data, and build the model and its optimizer.

        It writes no file, and leaves torch's settings and global generators as they were. A loop of
        your own over the parts computes as `run` does inside
        `base.machine.machine_settings(config.system)`. One of several processes makes its CUDA
        device the current one. Several processes check that they have the same config, code and
        data (see `base.distributed.agreement`) before any of them waits for another.

        Args:
            config: the resolved config.
            resumed: whether it belongs to a resumed run; see `check_optimization`.

        Raises:
            ConfigError, DataError: naming the key or the file, or what differs between processes.
            TypeError: the config is not resolved, such as a dictionary.
        """
        if not isinstance(config, Config):
            raise TypeError(
                "config: expected a resolved config, as base.config.load_config(file) or"
                f" base.config.validate(tree) returns it, not a {type(config).__name__}"
            )
        if started_processes() != world_size():
            raise ConfigError(
                "torchrun: the processes are not connected: train inside"
                " `with base.distributed.distributed_session(training=True):`"
            )

        with machine_settings(config.system):
            return cls._build(config, resumed)

    @classmethod
    def _build(cls, config: Config, resumed: bool) -> "Experiment":
        def facts(inputs: tuple[Any, ...]) -> Facts:
            _, training, validation, test = inputs
            data = data_facts(training=training, validation=validation, test=test)
            return {**config_facts(config), **data}

        device, train_loader, validation_loader, test_loader = prepare_on_all_ranks(
            lambda: cls._read(config, resumed), facts
        )
        # From here on the config is enough to build the model without the data.
        config = build.completed_config(config, train_loader)
        model = build.build_completed_model(
            config, mean=train_loader.mean, std=train_loader.std, device=device
        )
        build.check_images_fit(model, train_loader, config.arch.type)
        optimizer = build_optimizer(config.optimizer, model)
        return cls(
            config=config,
            train_loader=train_loader,
            validation_loader=validation_loader,
            test_loader=test_loader,
            model=model,
            optimizer=optimizer,
            schedule=Schedule(
                config.lr_scheduler,
                optimizer,
                config.trainer.epochs,
                len(train_loader),
                validation_loader is not None,
            ),
            precision=choose_precision(config.system.precision, device),
        )

    @staticmethod
    def _read(
        config: Config, resumed: bool
    ) -> tuple[torch.device, BaseDataLoader, BaseDataLoader | None, BaseDataLoader]:
        """Return this process's device, and the training, validation and test images."""
        # Everything that needs no images is checked first, because reading them may take minutes.
        check_optimization(config.optimizer, config.lr_scheduler, resumed)
        build.check_method(config)
        device = local_device(config)
        train_loader = build.build_data_loader(config, device)
        # Mixup mixes an image with any other of the minibatch, so each process needs all of them.
        train_loader.shard_batches = config.augmentation.mixup_alpha == 0
        validation_loader = train_loader.split_validation()
        test_loader = train_loader.test_loader()
        for loader in (train_loader, validation_loader, test_loader):
            if loader is not None:
                loader.prepare()
        # A user's part that breaks its contract should not fail in the middle of an epoch.
        check_first_batch(train_loader)
        build.check_losses_and_metrics(config, train_loader.num_classes, device)
        build.check_image_counts(config, train_loader, validation_loader, test_loader)
        return device, train_loader, validation_loader, test_loader

    def run(self, run_dir: str | Path | None = None, saved: SavedRun | None = None) -> RunResult:
        """Train, test, and write everything into a run folder.

        Args:
            run_dir: the folder of a new run; see `train`.
            saved: the run to continue instead, in its folder, which the caller has locked; see
                `resume`.

        Raises:
            RuntimeError: this experiment has run before: its weights are no longer new.
        """
        if self._has_run:
            raise RuntimeError(
                "this experiment has run; make a new one with Experiment.from_config(config)"
            )
        with machine_settings(self.config.system), ExitStack() as stack:
            # A method of the user's may draw from the global generators when it is built.
            seed_global_generators(self.config.seed, "method")
            if saved is None:
                folder = stack.enter_context(
                    run_folder.create(
                        self.config.trainer.save_dir, self.config.name, run_dir and str(run_dir)
                    )
                )
            else:
                self.check_same_data(saved)
                folder = saved.file.parent
            trainer = self.build_trainer(folder)
            self._has_run = True
            warnings: list[str | None] = []
            if saved is not None:
                # Nothing in the folder may change before this, because it may raise an error.
                best = trainer.resume(saved.checkpoint, saved.file)
                warnings = [saved.set_aside_damaged(), *saved.changed_code, best]
            with self._recorded(trainer, resumed=saved is not None, warnings=warnings):
                trainer.train()
                counts = self.image_counts() | self._noise_rate()
                result = run_final_test(trainer, self.test_loader, counts)
                trainer.trackers.log_result(result)
        return RunResult(trainer.folder, result)

    def check_same_data(self, run: SavedRun) -> None:
        """Check that a run to continue was trained on the same images, labels and classes.

        Raises:
            CheckpointError: naming the differences.
        """
        loader = self.train_loader
        checkpoint = run.checkpoint
        different = []
        if loader.fingerprint() != checkpoint["fingerprint"]:
            different.append("labels")
        normalization = [*loader.mean, *loader.std]
        saved = [*checkpoint["mean"], *checkpoint["std"]]
        if len(normalization) != len(saved) or not np.allclose(
            normalization, saved, rtol=0, atol=1e-6
        ):
            different.append("mean or std of the pixels")
        # Old checkpoints have no checksums of images, only their mean and std.
        saved_checksums = checkpoint.get("image_fingerprints")
        if saved_checksums is not None:
            checksums = loader.image_fingerprints()
            for part in sorted(checksums | saved_checksums):
                if checksums.get(part) != saved_checksums.get(part):
                    different.append(part)
        pairs = zip_longest(checkpoint["class_names"], loader.class_names)
        for number, (before, now) in enumerate(pairs):
            if before != now:
                different.append(f"class {number} is {before!r} there, {now!r} here")
                break
        if not different:
            return
        place = "data_loader.args.data_dir"
        if self.config.trainer.noise_file is not None:
            place += " (or trainer.noise_file)"
        raise CheckpointError(
            f"{run.file}: was trained on other images or labels than {place} now holds:"
            f" {', '.join(different)}"
        )

    @contextmanager
    def _recorded(
        self, trainer: BaseTrainer, *, resumed: bool, warnings: list[str | None]
    ) -> Iterator[None]:
        """Open the log and the trackers of a run and catch signals; `warnings` are of a resume."""
        config, folder, state = self.config, trainer.folder, trainer.state
        with logging_to(folder / INFO_LOG, config.trainer.verbosity):
            labels = self.train_loader.label_arrays()
            run_folder.write_description(folder, config, labels, resumed=resumed)
            logger.info("run folder %s", folder)
            log_description(self, trainer, labels, resumed)
            for warning in warnings:
                if warning is not None:
                    logger.warning(warning)
            if resumed:
                epochs = counted(state.epochs_done, "epoch")
                logger.info("resumed after %s and %s", epochs, counted(state.batches_done, "batch"))
            else:
                # Dropout must not drop the same units in every process.
                purpose = f"training {rank()}" if rank() > 0 else "training"
                seed_global_generators(config.seed, purpose)
            if is_primary():
                trainer.trackers = start_trackers(config, folder, state.history)
            try:
                if config.system.compile:
                    # Training, validation and attacks are compiled separately; beyond 8 versions
                    # torch would run the model without compiling it.
                    torch._dynamo.config.recompile_limit = 64
                    self.model.compile()
                device = trainer.device
                fitting = memory_explained(
                    "data_loader.args.batch_size", config.data_loader.args.batch_size, device
                )
                with trainer.signals.caught(), kernels_explained(device), fitting:
                    yield
            finally:
                trainer.trackers.close()

    def build_trainer(self, folder: Path) -> BaseTrainer:
        """Return the config's trainer, which will write into `folder`."""
        return build.build_trainer(
            self.config,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            train_loader=self.train_loader,
            validate=self._validator(),
            precision=self.precision,
            folder=folder,
            # Everything that `load_model` and a resume need without the data.
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
        """Return the function that measures a model on the validation set after an epoch.

        It returns loss and accuracies and, in some epochs, robust accuracy.
        """
        loader = self.validation_loader
        robust = self.robust_validation
        if loader is None:
            return lambda model, epoch: {}
        shard = loader.shard(rank(), world_size())
        evaluator = build.evaluator(self.config, self.autocast)

        def validate(model: BaseModel, epoch: int) -> dict[str, float]:
            values = evaluator(model, loader=shard, description="validating")
            # The robust accuracy of a model that has diverged means nothing.
            if robust is None or not_finite(values):
                return values
            return {**values, **robust(model, epoch)}

        return validate

    @cached_property
    def robust_validation(self) -> RobustValidation | None:
        """The attack on a part of the validation set; None if the config asks for none."""
        config, loader = self.config, self.validation_loader
        if loader is None or config.robust_validation_period == 0:
            return None
        # The same images in every epoch, so that the epochs can be compared.
        images = some_of_every_class(loader, config.adversarial.validate_images)
        # A network trained with FGSM may withstand FGSM alone: catastrophic overfitting.
        fgsm = None
        if config.method_attribute("validated_by_fgsm", False):
            fgsm = build_attacks.fgsm(config)
        return RobustValidation(
            images.shard(rank(), world_size()),
            build_attacks.build_attack(config, loader.num_classes),
            fgsm,
            period=config.robust_validation_period,
            epochs=config.trainer.epochs,
            seed=config.seed,
            autocast=self.autocast,
        )

    def autocast(self) -> AbstractContextManager:
        """Return the context of forward passes in the run's precision."""
        return autocast(next(self.model.parameters()).device, self.precision)

    def image_counts(self) -> dict[str, int]:
        """Return the number of training, validation and test images."""
        n_val = 0
        if self.validation_loader is not None:
            n_val = self.validation_loader.n_samples
        # `n_samples` of the training loader is less if `num_batches` limits an epoch.
        n_train = len(self.train_loader.label_arrays()["train_index"])
        return {"n_train": n_train, "n_val": n_val, "n_test": self.test_loader.n_samples}

    def _noise_rate(self) -> dict[str, float]:
        """Return the share of training labels that label noise has changed, if there is any."""
        noise = self.train_loader.noise_report()
        if noise is None:
            return {}
        return {"noise_rate": noise["train_rate"]}
