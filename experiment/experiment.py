"""Training from Python: `train`, `resume`, and `Experiment`, the parts that a config describes,
ready to run.

    import experiment

    result = experiment.train("configs/quickstart.json", {"trainer.epochs": 3},
    run_dir="runs/first") result["test_top1"], result.folder

With `build` and `final_test`, this module knows every room.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from attacks.threat_model import format_size
from base.atomic import replacing
from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, Validate
from base.checkpoint import has_checkpoint
from base.checkpoint.resume import SavedRun, saved_run
from base.config import Config, Override, load_config
from base.config.files import origins_named, override_layers, run_imports, validate_layers
from base.config.origins import Flag, Layer
from base.device import (
    autocast,
    choose_precision,
    determinism_explained,
    memory_explained,
    set_determinism,
)
from base.distributed import (
    distributed_session,
    from_primary,
    is_primary,
    rank,
    started_processes,
    world_size,
)
from base.distributed.agreement import agreed, config_facts, data_facts
from base.distributed.launch import launch, own_device
from base.errors import CheckpointError, ConfigError
from base.optim import Schedule, build_optimizer, check_optimization
from base.run_folder.environment import package_versions, record_environment
from base.run_folder.folder import begun_by_this_job, new_run_folder, only_run_in, write_json
from base.run_folder.logs import logging_to
from base.run_folder.names import CONFIG, INFO_LOG, LABELS
from base.seeding import seed_global_generators
from base.tracking.start import start_trackers
from base.tracking.tracker import tell
from base.train_state import not_finite
from data_loader.label_noise import describe_transitions
from data_loader.own_images import check_first_batch
from data_loader.splits import some_of_every_class
from evaluation.report import title
from experiment import build, build_attacks
from experiment.final_test import conclude
from trainer.robust_validation import RobustValidation

logger = logging.getLogger(__name__)


Overrides = Mapping[str, Any] | Iterable[Override]
"""Config values to replace: dotted keys with Python values, or pairs of a key and its value's text
as on a command line."""


@dataclass(frozen=True, eq=False)
class RunResult(Mapping[str, Any]):
    """What a run came to: a read-only mapping with the names and values of its `result.json`, such
    as `test_top1`.

    Attributes:
        folder: the run folder.
        values: by name.
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
        """The values as a plain dictionary, which JSON can hold."""
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
    """Train what a config describes, test it, and write a run folder, as train.py and
    train_robust.py do.

    SIGINT, which Ctrl-C and a notebook's stop button send, and SIGTERM end it after the current minibatch with all saved; in
    a thread other than the main one there are no signals. Under torchrun all processes call this function alike. Where
    torchrun has started them again after a failure (`--max-restarts`), a run that has reached a checkpoint in `run_dir` goes
    on there.

    Args:
        config: the file of a config, a tree of JSON values like that of a file, or a resolved
            config.
        overrides: values that replace the config's, such as `{"trainer.epochs": 3, "arch.type":
            "resnet34"}`; None gives a key its default.
        run_dir: the run folder, new or empty; None makes a new one,
            `<trainer.save_dir>/<name>/<time>`.
        imports: files and modules of your own to import first, as `--imports` names them, beside
            those of the config.
        check: called with the resolved config of a new run; raises a `ConfigError` for what is not
            to be trained.
        relaunch: where `n_gpu` asks for several processes and torchrun has not started them, run
            this process's own command in so many, and exit as they do. That is for scripts;
            otherwise such a config is refused.

    Returns:
        The values of `result.json`, and the run folder.

    Raises:
        ConfigError: the config, or `run_dir`, cannot be used.
        DataError: images or labels are missing or broken.
        NonFiniteError: a number became infinite or NaN; the last checkpoint is intact.
        Stopped: a signal asked for it; `resume(run folder)` goes on.
    """
    with distributed_session(training=True):
        if from_primary(lambda: _left_by_last_attempt(run_dir)):
            file = str(config) if isinstance(config, str | Path) else None
            return resume(run_dir, overrides, config_file=file, imports=imports, relaunch=relaunch)
        resolved = _resolved(config, overrides, imports)
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
    """Continue a run in its folder, bit for bit as if it had not been interrupted; a finished one
    is tested again.

    Args:
        path: a run folder, of which the last good checkpoint is taken, or a checkpoint.
        overrides: values that replace those of the run's config; see `train`. Only what does not
            make it another experiment may be replaced, such as `trainer.epochs`.
        config_file: a config with such values, under `overrides`.
        imports: files and modules of your own that the run needs; what its folder names is not run
            by itself.
        relaunch: see `train`.

    Returns:
        The values of `result.json`, and the run folder.

    Raises:
        CheckpointError: no undamaged checkpoint was found, or the checkpoint belongs to other data
            or another model.
        ConfigError: a replaced value would make it another experiment, or another process trains in
            its folder.
        DataError, NonFiniteError, Stopped: see `train`.
    """
    with distributed_session(training=True), ExitStack() as stack:
        saved = saved_run(str(path), config_file and str(config_file), _as_text(overrides), imports)
        stack.enter_context(origins_named(saved.config))
        _check_processes(saved.config, relaunch)
        from_primary(lambda: stack.enter_context(only_run_in(saved.file.parent)))
        return Experiment.from_config(saved.config, begun=True).run(saved=saved)


def _resolved(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Overrides,
    imports: Iterable[str | Path],
) -> Config:
    settings = _as_text(overrides)
    if isinstance(config, str | Path):
        return load_config(config, settings, imports)
    if isinstance(config, Config):
        if not settings:
            # as it is: a dump leaves out the Comet key
            return config
        config = config.dump()
    files = [Layer("config", dict(config))]
    _, own = run_imports(files, imports)
    return validate_layers([*files, *override_layers(settings)], own, "config")


def _as_text(overrides: Overrides) -> list[Override]:
    """Overrides as the command line has them, whose values are JSON."""
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
    """A path as its text, a number of NumPy as Python's."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _check_processes(config: Config, relaunch: bool) -> None:
    """Start the processes that `n_gpu` asks for, which does not return, or refuse to.

    Raises:
        ConfigError: there is one process, and it may not start others.
    """
    if started_processes() > 1 or config.n_gpu <= 1:
        return
    if not relaunch:
        raise ConfigError(
            f"n_gpu: {config.n_gpu} processes are asked for, and this is one: train with train.py, or under torchrun, or set"
            " n_gpu to 1"
        )
    launch(config)


def _left_by_last_attempt(run_dir: str | Path | None) -> bool:
    """Whether an earlier attempt of the same job has made the run folder and saved a checkpoint in
    it."""
    if run_dir is None:
        return False
    folder = Path(run_dir).expanduser()
    return has_checkpoint(folder) and begun_by_this_job(folder)


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
    train_loader: BaseDataLoader
    validation_loader: BaseDataLoader | None
    test_loader: BaseDataLoader
    model: BaseModel
    optimizer: Optimizer
    schedule: Schedule
    precision: str

    @classmethod
    def from_config(cls, config: Config, begun: bool = False) -> "Experiment":
        """Check the optimization, read the data, build the model and its optimizer.

        Several processes make sure that they have the same config, code and data (see
        `base.distributed.agreement`), before any of them waits for another.

        Args:
            config: the resolved config.
            begun: it is that of a run that is continued; see `check_optimization`.

        Raises:
            ConfigError, DataError: one line that names the key or file, or what differs between
                processes.
        """
        if started_processes() != world_size():
            raise ConfigError(
                "torchrun: the processes have not met: train inside `with base.distributed.distributed_session(training=True):`"
            )
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
        schedule = Schedule(
            config.lr_scheduler, optimizer, epochs, batches, validation_loader is not None
        )
        precision = choose_precision(config.system.precision, device)
        return cls(
            config,
            train_loader,
            validation_loader,
            test_loader,
            model,
            optimizer,
            schedule,
            precision,
        )

    @staticmethod
    def _read(
        config: Config, begun: bool
    ) -> tuple[torch.device, BaseDataLoader, BaseDataLoader | None, BaseDataLoader]:
        """This process's device, and its training, validation and test images."""
        check_optimization(config.optimizer, config.lr_scheduler, begun)
        build.check_method(config)
        set_determinism(config.system.deterministic, config.system.num_threads)
        device = own_device(config)
        train_loader = build.build_data_loader(config, device)
        # mixup's partners are anywhere in the minibatch
        train_loader.shard_batches = config.augmentation.mixup_alpha == 0
        validation_loader, test_loader = train_loader.split_validation(), train_loader.test_loader()
        for loader in filter(None, (train_loader, validation_loader, test_loader)):
            loader.prepare()
        check_first_batch(train_loader)
        build.refuse_too_few_images(config, train_loader, validation_loader, test_loader)
        return device, train_loader, validation_loader, test_loader

    def run(self, run_dir: str | Path | None = None, saved: SavedRun | None = None) -> RunResult:
        """Train, test, and write everything into a run folder.

        Args:
            run_dir: the folder of a new run; see `train`.
            saved: the run to continue instead, in its folder, of which no other may make use; see
                `resume`.
        """
        with ExitStack() as stack:
            if saved is None:
                place = new_run_folder(
                    self.config.trainer.save_dir, self.config.name, run_dir and str(run_dir)
                )
                trainer = self.build_trainer(from_primary(lambda: stack.enter_context(place)))
                warnings = []
            else:
                self.refuse_other_data(saved)
                trainer = self.build_trainer(saved.file.parent)
                # a resume that is refused leaves everything as it was
                best = trainer.resume(saved.checkpoint, saved.file)
                warnings = [saved.set_aside_damaged(), *saved.changed_code, best]
            with self._recorded(trainer, resumed=saved is not None, warnings=warnings):
                trainer.train()
                result = conclude(trainer, self.test_loader, self._counts() | self._noise_rate())
                tell(trainer.trackers, lambda tracker: tracker.log_result(result))
        return RunResult(trainer.folder, result)

    @classmethod
    def resume(
        cls, path: str, config_file: str | None = None, overrides: Overrides = ()
    ) -> RunResult:
        """Continue a run; see `experiment.resume`."""
        return resume(path, overrides, config_file=config_file)

    def refuse_other_data(self, run: SavedRun) -> None:
        """Refuse to continue a run on other images, labels or classes.

        Raises:
            CheckpointError: the checkpoint's are others. Those from before there were digests of
                images are compared by mean and standard deviation of the training images only.
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
            number, (there, here) = next(
                (number, pair) for number, pair in pairs if pair[0] != pair[1]
            )
            different.append(f"class {number} is {there!r} there, {here!r} here")
        if different:
            place = "data_loader.args.data_dir"
            if self.config.trainer.noise_file is not None:
                place += " (or trainer.noise_file)"
            raise CheckpointError(
                f"{run.file}: was trained on other images or labels than {place} now holds: {', '.join(different)}"
            )

    @contextmanager
    def _recorded(
        self, trainer: BaseTrainer, *, resumed: bool, warnings: list[str | None]
    ) -> Iterator[None]:
        """A run's log, trackers and signals, for as long as it lasts; `warnings` are those of a
        resume."""
        config, folder, state = self.config, trainer.folder, trainer.state
        with (
            logging_to(folder / INFO_LOG, config.trainer.verbosity) if is_primary() else _silence()
        ):
            self._describe(folder, resumed)
            for warning in filter(None, warnings):
                logger.warning(warning)
            if resumed:
                logger.info(
                    "resumed after %d epochs and %d batches", state.epochs_done, state.batches_done
                )
            else:
                # copies of a model must not drop the same units
                seed_global_generators(config.seed, f"training {rank()}" if rank() else "training")
            trainer.trackers = start_trackers(config, folder, state.history) if is_primary() else []
            try:
                if config.system.compile:
                    # training, validation, attacks and averaged weights each ask for their own code
                    torch._dynamo.config.recompile_limit = 64
                    self.model.compile()
                fitting = memory_explained(
                    "data_loader.args.batch_size", config.data_loader.args.batch_size
                )
                with trainer.signals.caught(), determinism_explained(), fitting:
                    yield
            finally:
                tell(trainer.trackers, lambda tracker: tracker.close())

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
        """What is measured on the validation set after an epoch: loss and accuracies, in some
        epochs robust accuracy."""
        loader, robust = self.validation_loader, self.robust_validation
        if loader is None:
            return lambda model, epoch: {}
        shard = loader.shard(rank(), world_size())
        evaluator = build.evaluator(self.config, self.autocast)
        clean = partial(evaluator, loader=shard, description="validating")

        def validate(model: BaseModel, epoch: int) -> dict[str, float]:
            values = clean(model)
            if robust is None or not_finite(values):  # a model that has diverged is not attacked
                return values
            return {**values, **robust(model, epoch)}

        return validate

    @cached_property
    def robust_validation(self) -> RobustValidation | None:
        """The attack on a part of the validation set that the config asks for; None where it asks
        for none."""
        config, loader = self.config, self.validation_loader
        if loader is None or config.robust_validation_period == 0:
            return None
        return RobustValidation(
            some_of_every_class(loader, config.adversarial.validate_images).shard(
                rank(), world_size()
            ),
            build_attacks.build_attack(config, loader.num_classes),
            build_attacks.fgsm(config) if config.of_method("validated_by_fgsm", False) else None,
            period=config.robust_validation_period,
            epochs=config.trainer.epochs,
            seed=config.seed,
            autocast=self.autocast,
        )

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes in the run's precision."""
        return autocast(next(self.model.parameters()).device, self.precision)

    def _describe(self, folder: Path, resumed: bool) -> None:
        """Write what the run is, before it begins: config, environment, labels."""
        loader, counts = self.train_loader, self._counts()
        layers = self.config.arch.args
        labels = loader.label_arrays()
        if is_primary():
            write_json(folder / CONFIG, self.config.dump())
            for warning in record_environment(folder, resumed):
                logger.warning(warning)
            with replacing(folder / LABELS) as file:
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
        for warning in loader.warnings:
            logger.warning(warning)
        for remark in loader.remarks:
            logger.info("data set: %s", remark)
        validation_split = self.config.data_loader.args.validation_split
        if loader.names_validation and validation_split > 0:
            logger.warning(
                "validation_split has no effect: the data set names its validation images itself"
            )
        elif counts["n_val"] and not loader.names_validation and validation_split == 0:
            logger.warning(
                "validation_split is 0, but validation is asked for: 10 % of every class is held out"
            )
        if self.train_loader.n_samples < self.train_loader.batch_size:
            logger.warning(
                "data_loader.args.batch_size: %d is more than the %d training images: every minibatch holds all of them",
                self.train_loader.batch_size,
                self.train_loader.n_samples,
            )
        self._describe_adversary()
        noise = loader.noise_report()
        if noise is not None:
            logger.info(
                "label noise: %s",
                ", ".join(f"{key} {value}" for key, value in noise.items() if value is not None),
            )
            warning = loader.noise_warning()
            if warning:
                logger.warning("label noise: %s", warning)
            for line in describe_transitions(labels["transition_matrix"], loader.class_names):
                logger.info("label noise: %s", line)

    def _counts(self) -> dict[str, int]:
        """How many images there are to train on, to validate and to test."""
        held_out = self.validation_loader.n_samples if self.validation_loader else 0
        # of which num_batches may take fewer in an epoch
        n_train = len(self.train_loader.label_arrays()["train_index"])
        return {"n_train": n_train, "n_val": held_out, "n_test": self.test_loader.n_samples}

    def _noise_rate(self) -> dict[str, float]:
        """The share of training labels that noise has changed; nothing without noise."""
        noise = self.train_loader.noise_report()
        return {} if noise is None else {"noise_rate": noise["train_rate"]}

    def _describe_adversary(self) -> None:
        config, robust = self.config, self.robust_validation
        threat = build_attacks.threat_model(config)
        radius = f"{threat.norm} {format_size(threat.epsilon, threat.norm)}"
        if config.attacks_while_training:
            epochs = config.adversarial.get("warmup_epochs", 0)
            growing = f", growing over the first {epochs} epochs" if epochs else ""
            logger.info(
                "adversarial training: %s, %s%s", config.adversarial_method, radius, growing
            )
        if robust is not None:
            logger.info(
                "robust validation: %s, on %d of %d validation images (the first of every class), every %d epochs",
                title(robust.attack), robust.n_samples, self.validation_loader.n_samples, robust.period,
            )  # fmt: skip
        elif config.attacks_while_training:
            logger.info(
                "no robust validation: %s",
                "nothing is held out" if config.robust_validation_period else "not asked for",
            )


@contextmanager
def _silence() -> Iterator[None]:
    """A context in which log messages go nowhere: rank 0 has the same ones."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
