"""BaseTrainer: the epoch loop, one optimizer step, and everything around them that does not depend
on the training method."""

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.checkpoint import load_weights
from base.checkpoint.manager import CheckpointManager
from base.config import Config
from base.device import autocast, to_device
from base.diagnosis import first_bad_weight
from base.distributed import (
    Shard,
    ShardedGenerator,
    all_reduce_max,
    exit_unless_primary,
    from_primary,
    hide_progress_bar,
    is_primary,
    rank,
    shard_of,
    world_size,
)
from base.distributed.ddp import broadcast_buffers, distribute_bn, wrap_ddp
from base.ema import ModelEma
from base.errors import CheckpointError, ConfigError, NonFiniteError, Stopped
from base.meters import BatchResult, Loss, Meters, Metric, batch_result
from base.nan_guard import NanGuard
from base.optim import Schedule, load_optimizer
from base.optim.state import checked_optimizer_state, checked_schedule_state, named_optimizer_state
from base.run_folder.logs import describe
from base.seeding import (
    get_rng_state,
    numpy_generator,
    seed_global_generators,
    set_rng_state,
    torch_generator,
)
from base.signals import Interrupted, StopSignals
from base.text import first_line, one_line
from base.tracking.tracker import Tracker, tell
from base.train_state import TrainState

logger = logging.getLogger(__name__)
Validate = Callable[[BaseModel, int], dict[str, float]]


Penalty = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class TrainerParts:
    """What every training method is made from; `experiment.build.build_trainer` puts it together.

    Attributes:
        config: the resolved config.
        model: on its device.
        optimizer: over the model's parameters.
        schedule: of the optimizer's learning rate.
        train_loader: shuffled, augmented minibatches.
        validate: `(model, epoch) -> {name: value}` on held-out images; it returns an
            empty dict to train without validation.
        loss: per-sample loss.
        metrics: counts of correct samples in a batch, by name.
        penalty: a scalar function of the model that is added to the loss of every update, such as
            OCNN's weighted orthogonality penalty.
        norm: of perturbations, `"linf"` or `"l2"`.
        epsilon: their radius in units of the pixel range `[0, 1]`.
        precision: `"fp32"` or `"bf16"`, for forward passes.
        folder: the run folder, which exists.
        metadata: further plain values for every checkpoint (config, mean, std, fingerprints,
            versions).
    """

    config: Config
    model: BaseModel
    optimizer: Optimizer
    schedule: Schedule
    train_loader: BaseDataLoader
    validate: Validate
    loss: Loss
    metrics: Mapping[str, Metric]
    penalty: Penalty | None
    norm: str
    epsilon: float
    precision: str
    folder: Path
    metadata: Mapping[str, Any]


class BaseTrainer(ABC):
    """Trains a model: epochs, validation, monitoring, early stop, checkpoints, resume, logging,
    signals.

    A training method is a subclass with one method, `train_batch`, that calls `update` for every
    optimizer step, so that it reads like the algorithm of its paper. Its constructor takes the
    parts and, by keyword, the method's own arguments: those are what the config's section
    `adversarial` takes for it. An entry in `base.registry.TRAINERS` makes it known to configs.

    SIGINT and SIGTERM end training after the current minibatch, with a checkpoint from which
    `resume` continues bit for bit (on the same device and library versions; up to rounding with
    three processes or more). Values of every epoch go to `trackers`, which are set from outside.

    Where several processes train, each trains a copy of the model on its shard of every minibatch
    (see `Shard`), and rank 0 writes.

    Args:
        parts: see `TrainerParts`.
    """

    attacks_while_training: ClassVar[bool] = False
    """Whether the method attacks images: its command is train_robust.py then, and every validation
    attacks, too."""
    validated_by_fgsm: ClassVar[bool] = False
    """Whether robust validation measures FGSM accuracy, too; see
    `trainer.robust_validation.overfitting_warnings`."""
    takes_mixup: ClassVar[bool] = False
    """Whether `train_batch` takes class probabilities for labels, which is what mixup makes of
    them."""

    def __init__(self, parts: TrainerParts) -> None:
        self.config = parts.config
        self.model = parts.model
        # for training passes: behind DistributedDataParallel where there are copies
        self.network: nn.Module = parts.model
        self.optimizer = parts.optimizer
        self.nan_guard = NanGuard(parts.optimizer, parts.folder)
        self.schedule = parts.schedule
        self.train_loader = parts.train_loader
        self.validate_model = parts.validate
        self.loss = parts.loss
        self.metrics = parts.metrics
        self.penalty = parts.penalty
        self.precision = parts.precision
        self.folder = parts.folder
        self.checkpoints = CheckpointManager(parts.folder, parts.config.trainer)
        self.trackers: list[Tracker] = []
        self.metadata = parts.metadata
        self.device = next(parts.model.parameters()).device
        self.images: Tensor | None = None  # the minibatch that is being trained on
        self.state = TrainState()
        self.meters = Meters()
        decay = parts.config.trainer.ema_decay
        self.ema = None if decay is None else ModelEma(parts.model, decay)
        self.signals = StopSignals()

    @abstractmethod
    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Train on one minibatch: every forward pass, and `update` for every optimizer step.

        Args:
            images: float32 `(B, C, H, W)` in `[0, 1]`, on the model's device, which is in training
                mode.
            labels: int64 `(B,)`; with mixup class probabilities, float32 `(B, num_classes)`.

        Returns:
            Sums and counts, never means; see `result`.
        """

    def update(self, losses: Tensor) -> None:
        """One optimizer step on the mean of `losses` `(B,)`, one per sample, and the penalty on the
        weights.

        The mean is that over the samples of all processes: DistributedDataParallel averages
        gradients.

        Raises:
            NonFiniteError: the loss or a gradient is infinite or NaN, now or, on a GPU, since the
            last look at the device (see `NanGuard`). No parameter was updated from there on
            (running statistics, which the forward pass moves, were).
        """
        _check_per_sample(losses, self)
        loss = self.shard(losses).mean(losses)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        # a loss that is not finite makes every gradient NaN, in every process
        loss.backward(1 + 0 * loss.detach())
        self.nan_guard.look(self.model, loss, self.state, self.images)
        self.optimizer.step()
        distribute_bn(self.model)
        if self.ema is not None:
            self.ema.update()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of a training pass in the run's precision."""
        with self.autocast():
            return self.network(images)

    def result(self, losses: Tensor, logits: Tensor, labels: Tensor) -> BatchResult:
        """What one pass over a minibatch adds to the epoch: its loss and the config's metrics.

        Args:
            losses: `(B,)`, as they were given to `update`; the penalty is not logged.
            logits: `(B, num_classes)`.
            labels: as `train_batch` takes them.
        """
        return batch_result(losses, logits, labels, self.metrics)

    def shard(self, images: Tensor) -> Shard:
        """This process's part of the minibatch that is being trained on; with one process that is
        `images`."""
        if world_size() == 1:
            return Shard(len(images))
        loader = self.train_loader
        return shard_of(
            min(loader.batch_size, loader.n_samples - self.state.batches_done * loader.batch_size)
        )

    @property
    def minibatch(self) -> tuple[int, int]:
        """Epoch and number of the minibatch that is being trained on, from which its random draws
        are derived."""
        return self.state.epochs_done + 1, self.state.batches_done

    def generator(self, purpose: str, images: Tensor) -> torch.Generator | ShardedGenerator:
        """Where this minibatch's random numbers for `purpose` come from; they do not depend on the
        number of processes."""
        generator, shard = (
            torch_generator(self.config.seed, purpose, *self.minibatch),
            self.shard(images),
        )
        return generator if shard.processes == 1 else ShardedGenerator(generator, shard)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup (Zhang et al., arXiv:1710.09412), where the config asks for it: pairs of images and
        of labels are averaged with one Beta(alpha, alpha) weight per minibatch.

        Returns images and class probabilities `(B, num_classes)`; without mixup, images and labels
        `(B,)` as they came. As cross entropy is linear in the probabilities, it is that of both
        labels with their weights, in training and inside every attack.

        An image's partner may be any of the minibatch: where several processes train, mixup is
        given the whole minibatch and returns the shard of this one."""
        alpha = self.config.augmentation.mixup_alpha
        if alpha == 0:
            return images, labels
        key = ("mixup", *self.minibatch)
        weight = float(numpy_generator(self.config.seed, *key).beta(alpha, alpha))
        partner = to_device(
            torch.randperm(len(labels), generator=torch_generator(self.config.seed, *key)),
            labels.device,
        )
        targets = F.one_hot(labels, self.train_loader.num_classes).to(images.dtype)
        part = self.shard(images).part
        own = partner[part]
        return torch.lerp(images[own], images[part], weight), torch.lerp(
            targets[own], targets[part], weight
        )

    def autocast(self) -> AbstractContextManager:
        """The context for forward passes in the run's precision."""
        return autocast(self.device, self.precision)

    def train(self) -> None:
        """Train until the last epoch or the early stop.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            NonFiniteError: see `update` and `_check_epoch`; the last saved checkpoint is intact.
        """
        self.network = wrap_ddp(self.model)
        with self.signals.caught():
            # a kill in the first epoch loses nothing, a full disk is found out now, and a damaged
            # file is replaced
            self.checkpoints.save_last(self.checkpoint())
            self.checkpoints.check_disk_space()
            while not self.finished:
                log = {**self._train_epoch(), **self._validated()}
                self._check_epoch(log)
                self._finish_epoch(log)
                if self._asked_to_stop():
                    self._stop()

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done or the early stop is due."""
        patience = self.config.trainer.early_stop
        if patience is not None and self.state.epochs_without_improvement >= patience:
            return True
        return self.state.epochs_done >= self.config.trainer.epochs

    def validate(self) -> dict[str, float]:
        """Values on the held-out images, their names prefixed with `val_`, and with `val_ema_` for
        the averaged weights."""
        epoch = self.state.epochs_done + 1
        values = {
            f"val_{name}": value for name, value in self.validate_model(self.model, epoch).items()
        }
        if self.ema is not None:
            averaged = self.validate_model(self.ema.model, epoch)
            values |= {f"val_ema_{name}": value for name, value in averaged.items()}
        return values

    def _validated(self) -> dict[str, float]:
        """`validate`, which a signal ends at once, as an attack may take longer than a cluster
        waits. What is saved then is the state after the epoch's last minibatch; a resumed run
        validates again. Several processes finish it, as none can leave alone."""
        if world_size() > 1:
            return self.validate()
        try:
            with self.signals.interrupting():
                return self.validate()
        except Interrupted:
            self._stop()

    def epoch_warnings(self, log: Mapping[str, Any]) -> list[str]:
        """What there is to warn of after an epoch that logged these values; what the epochs before
        it logged is `state.history`."""
        return []

    def method_state(self) -> dict[str, Any]:
        """What a training method carries from minibatch to minibatch, for checkpoints: tensors and
        plain values."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Continue from what `method_state` returned; raises a `ValueError` that says what is wrong
        with it."""

    def checkpoint(self) -> dict[str, Any]:
        """Everything `resume` needs and a reader of the weights, whatever number of processes
        train. All of them call it.

        Raises:
            NonFiniteError: see `update`.
        """
        self.nan_guard.read()
        self.nan_guard.note_saved(self.state)
        average = {}
        if self.ema is not None:
            average = {
                "ema_state_dict": self.ema.model.state_dict(),
                "ema_updates": self.ema.updates,
            }
        return {
            **self.metadata,
            **average,
            "arch": type(self.model).__name__,
            "epoch": self.state.epochs_done,
            "batch": self.state.batches_done,
            "state_dict": self.model.state_dict(),
            "optimizer": named_optimizer_state(self.optimizer, self.model),
            "optimizer_type": type(self.optimizer).__name__,
            "scheduler": self.schedule.state_dict(),
            "scheduler_type": self.config.lr_scheduler.type,
            "monitor_best": self.state.best_value,
            "progress": vars(self.state),
            "totals": self.meters.all_reduce().state_dict(),
            "method": self.method_state(),
            "rng": get_rng_state(),
        }

    def resume(self, checkpoint: Mapping[str, Any], source: Path) -> str | None:
        """Continue from a checkpoint of this run; returns what there is to warn of.

        Nothing is written before all has been checked.

        Args:
            checkpoint: as `base.checkpoint.schema.check_training_state` has checked it.
            source: its file.

        Raises:
            CheckpointError: it does not fit this model, optimizer, schedule or training method.
            NonFiniteError: its weights are infinite or NaN.
        """
        if "progress" not in checkpoint:
            raise CheckpointError(
                f"{source}: holds no training state (ConvNorm's format): it can be evaluated, not resumed"
            )
        kinds = {
            "optimizer_type": type(self.optimizer).__name__,
            "scheduler_type": self.config.lr_scheduler.type,
        }
        for key, ours in kinds.items():
            if checkpoint[key] != ours:
                theirs = one_line(checkpoint[key], 80)
                raise CheckpointError(
                    f"{source}: was trained with {key} {theirs}, this config has {ours}"
                )
        self.state = state = TrainState(**checkpoint["progress"])
        batches = len(self.train_loader)
        if state.batches_done > batches:
            raise CheckpointError(
                f"{source}: has done {state.batches_done} batches of an epoch of {batches}"
            )
        steps = state.epochs_done
        if self.schedule.steps_by_batch:
            steps = steps * batches + state.batches_done
        optimizer = checked_optimizer_state(
            self.optimizer, self.model, checkpoint["optimizer"], source
        )
        schedule = checked_schedule_state(
            checkpoint["scheduler"], self.schedule.state_dict(), steps, source
        )
        load_weights(self.model, checkpoint["state_dict"], source)
        diverged = first_bad_weight(self.model)
        if diverged is not None:
            raise NonFiniteError(
                f"{source}: {diverged} is not finite: the run has diverged there; name an earlier checkpoint"
            )
        load_optimizer(self.optimizer, optimizer)
        self.nan_guard.forget()
        self.schedule.load_state_dict(schedule)
        if is_primary():  # they are those of all processes
            self.meters.load_state_dict(checkpoint["totals"], self.device)
        try:
            self.load_method_state(checkpoint.get("method", {}))
        except ValueError as error:
            raise CheckpointError(f"{source}: method: {error}") from None
        if self.ema is not None:
            for key in ("ema_state_dict", "ema_updates"):
                if key not in checkpoint:
                    raise CheckpointError(
                        f"{source}: {key!r} is missing, but trainer.ema_decay asks for averaged weights"
                    )
            self.ema.load_state_dict(
                checkpoint["ema_state_dict"], checkpoint["ema_updates"], source
            )
        self._restore_generators(checkpoint["rng"], source)
        return self.checkpoints.restore_best(state, source, finished=self.finished)

    def _restore_generators(self, states: Mapping[str, Any], source: Path) -> None:
        """Go on with torch's global generators as they were; with several processes `states` are
        those of rank 0."""

        def restore() -> None:
            try:
                set_rng_state(states)
            except (RuntimeError, TypeError) as error:
                reason = first_line(error)
                raise CheckpointError(
                    f"{source}: rng: is not the state of a generator of torch: {reason}"
                ) from None

        from_primary(restore)
        if not is_primary():  # copies of a model must not drop the same units
            state = self.state
            seed_global_generators(
                self.config.seed, f"training {rank()} {state.epochs_done} {state.batches_done}"
            )

    def _train_epoch(self) -> dict[str, Any]:
        self.model.train()
        state = self.state
        epoch = state.epochs_done + 1
        if state.batches_done == 0:
            state.learning_rate = self.schedule.learning_rate
        self.train_loader.set_epoch(epoch, first_batch=state.batches_done)
        bar = tqdm(
            self.train_loader,
            desc=f"epoch {epoch}/{self.config.trainer.epochs}{self._accuracies_so_far()}",
            total=len(self.train_loader),
            initial=state.batches_done,
            disable=hide_progress_bar(),
            leave=False,
        )
        begin = perf_counter()
        for images, labels in bar:
            images, labels = images.to(self.device), labels.to(self.device)
            shard, self.images = self.shard(images), images
            result = self.train_batch(*self.mixed(images, labels))
            _check_result(result, self)
            if shard.counts:
                self.meters.add(result)
            self.schedule.step_batch()
            state.batches_done += 1
            state.images_seen += shard.total
            if not bar.disable and state.batches_done % 10 == 0:
                bar.set_postfix_str(describe(self.meters.means()))
            if self._asked_to_stop():
                state.train_seconds += perf_counter() - begin
                self._stop()
        self.nan_guard.read()
        # reads the device, so the time is that of finished work
        means = self.meters.all_reduce().means()
        state.train_seconds += perf_counter() - begin
        broadcast_buffers(self.model)
        return {"epoch": epoch, "lr": state.learning_rate, **means}

    def _accuracies_so_far(self) -> str:
        """Validation accuracies of the last epoch, for the progress bar."""
        log = next(reversed(self.state.history), {})
        kinds = {"clean": log.get("val_top1"), "robust": log.get("val_robust_top1")}
        known = [f"{value:.1%} {kind}" for kind, value in kinds.items() if value is not None]
        return f" (validation: {', '.join(known)})" if known else ""

    def _check_epoch(self, log: Mapping[str, Any]) -> None:
        """Refuse to count an epoch that has diverged.

        Raises:
            NonFiniteError: a weight, a value of the epoch, or, where nothing was validated, an
            answer of the model is infinite or NaN.
        """
        self.nan_guard.check_weights(self.model, self.state)
        self.nan_guard.check_values(self.model, self.state, self.images, log)
        if "val_loss" not in log:
            self.nan_guard.check_answers(self.model, self.state, self.images)

    def _finish_epoch(self, log: dict[str, Any]) -> None:
        self.schedule.step_epoch(log)
        self.meters = Meters()
        for warning in self.epoch_warnings(log):
            logger.warning(warning)
        improved = self.state.finish_epoch(log, self.config.trainer.monitor)
        self.checkpoints.save_epoch(self.checkpoint(), self.state.epochs_done, improved)
        tell(self.trackers, lambda tracker: tracker.log_epoch(log))
        logger.info("%s%s", describe(log), "  (best)" if improved else "")

    def _asked_to_stop(self) -> bool:
        """Whether a signal has reached any process: all stop after the same minibatch."""
        asked = all_reduce_max(self.signals.asked or 0)
        if asked:  # otherwise one may have come just now, for next time
            self.signals.asked = asked
        return asked > 0

    def _stop(self) -> NoReturn:
        """Save in the middle of an epoch, or after one, and leave.

        Raises:
            Stopped: the state is saved.
            NonFiniteError: the model has diverged with the last update; nothing is saved.
        """
        self.nan_guard.read()
        if self.state.batches_done:  # of an epoch that has not been judged yet
            self.nan_guard.check_weights(self.model, self.state)
            self.nan_guard.check_answers(self.model, self.state, self.images)
        self.checkpoints.save_last(self.checkpoint())
        exit_unless_primary(128 + self.signals.asked)
        done = f"{self.state.epochs_done} epochs and {self.state.batches_done} batches"
        name = signal.Signals(self.signals.asked).name
        raise Stopped(
            f"stopped by {name} after {done}; continue with -r {self.folder}", self.signals.asked
        )


def _check_per_sample(losses: Tensor, trainer: BaseTrainer) -> None:
    """Refuse a mean, which could not be averaged over the samples of several processes.

    Raises:
        ConfigError: naming the training method.
    """
    if losses.dim() != 1:
        raise ConfigError(
            f"{type(trainer).__name__}.train_batch: update takes one loss per sample, of shape (B,), not {tuple(losses.shape)}"
        )


def _check_result(result: object, trainer: BaseTrainer) -> None:
    """Refuse what cannot be added to an epoch's values, such as the None of a method that returns
    nothing.

    Raises:
        ConfigError: naming the training method.
    """
    if not isinstance(result, BatchResult):
        raise ConfigError(
            f"{type(trainer).__name__}.train_batch: returns a {type(result).__name__}, not a BatchResult, such as"
            " self.result(losses, logits, labels)"
        )
