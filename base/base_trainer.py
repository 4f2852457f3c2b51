"""BaseTrainer: one optimizer step, the epoch loop, and everything around them that does not depend
on the training method."""

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from base.device import to_device
from base.distributed import (
    Shard,
    ShardedGenerator,
    exit_unless_primary,
    from_primary,
    hide_progress_bar,
    is_primary,
    rank,
    shard_of,
    world_size,
)
from base.distributed.ddp import broadcast_buffers, distribute_bn, wrap_ddp
from base.draws_ahead import DrawsAhead
from base.ema import ModelEma
from base.errors import CheckpointError, ConfigError, NonFiniteError, Stopped
from base.meters import BatchResult, Loss, Meters, Metric, batch_result, check_losses
from base.nan_guard import NanGuard, first_bad_weight
from base.optim import Schedule, load_optimizer
from base.optim.state import checked_optimizer_state, checked_schedule_state, named_optimizer_state
from base.precision import autocast, tf32
from base.run_folder.logs import format_values
from base.seeding import (
    get_rng_state,
    numpy_generator,
    seed_global_generators,
    set_rng_state,
    torch_generator,
)
from base.signals import Interrupted, StopQuestions, StopSignals
from base.text import counted, first_line, one_line
from base.tracking.tracker import Tracker, Trackers
from base.train_state import TrainState

logger = logging.getLogger(__name__)

Validate = Callable[[BaseModel, int], dict[str, float]]


@dataclass(frozen=True)
class TrainerParts:
    """The parts of a training method; `experiment.build.build_trainer` builds them.

    Attributes:
        config: the resolved config.
        model: on its device.
        optimizer: over the model's parameters.
        schedule: of the optimizer's learning rate.
        train_loader: shuffled, augmented minibatches.
        validate: `(model, epoch) -> {name: value}` on held-out images; it returns an empty dict to
            train without validation.
        loss: per-sample loss.
        metrics: counts of correct samples in a batch, by name.
        penalty: a scalar function of the model that is added to the loss of every update, such as
            OCNN's weighted orthogonality penalty.
        norm: of perturbations, `"linf"` or `"l2"`.
        epsilon: radius of perturbations in units of the pixel range `[0, 1]`.
        precision: of forward passes, `"fp32"`, `"tf32"` or `"bf16"`.
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
    penalty: Callable[[nn.Module], Tensor] | None
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
    parts and, by keyword, the method's own arguments, which a config gives in its section
    `adversarial`. An entry in `base.registry.TRAINERS` makes it known to configs.

    SIGINT, SIGTERM and SIGHUP end training after the current minibatch, with a checkpoint from
    which `resume` continues bit for bit (on the same device and library versions; with three
    processes or more up to rounding). The values of every epoch go to `trackers`, which the caller
    sets.

    Where several processes train, each trains a copy of the model on its shard of every minibatch
    (see `Shard`), and rank 0 writes.

    Args:
        parts: see `TrainerParts`.
    """

    attacks_while_training: ClassVar[bool] = False
    """Whether the method attacks images. If so, its command is train_robust.py, and every
    validation attacks, too."""
    validated_by_fgsm: ClassVar[bool] = False
    """Whether robust validation also measures FGSM accuracy; see
    `trainer.robust_validation.overfitting_warnings`."""
    takes_mixup: ClassVar[bool] = False
    """Whether `train_batch` accepts class probabilities as labels, which mixup produces."""

    def __init__(self, parts: TrainerParts) -> None:
        self.config = parts.config
        self.model = parts.model
        # For training passes: several processes wrap the model in DistributedDataParallel
        self.network: nn.Module = parts.model
        self.optimizer = parts.optimizer
        self.schedule = parts.schedule
        self.train_loader = parts.train_loader
        self.validate_model = parts.validate
        self.loss = parts.loss
        self.metrics = parts.metrics
        self.penalty = parts.penalty
        self.precision = parts.precision
        self.folder = parts.folder
        self.metadata = parts.metadata
        self.device = next(parts.model.parameters()).device
        self.state = TrainState()
        self.meters = Meters()
        self.ema: ModelEma | None = None
        if parts.config.trainer.ema_decay is not None:
            self.ema = ModelEma(parts.model, parts.config.trainer.ema_decay)
        self.nan_guard = NanGuard(parts.optimizer, parts.folder)
        self.checkpoints = CheckpointManager(parts.folder, parts.config.trainer)
        self.trackers: Tracker = Trackers()
        self.signals = StopSignals()
        self.stop_questions = StopQuestions()
        self.draws_ahead = DrawsAhead()
        # The current minibatch as it was loaded, for the nan guard's message
        self.images: Tensor | None = None
        # How many images of the minibatch this process trains on; None before the first one
        self._samples: int | None = None

    # What a training method writes

    @abstractmethod
    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Train on one minibatch: every forward pass, and `update` for every optimizer step.

        Args:
            images: float32 `(B, C, H, W)` in `[0, 1]`, on the device of the model, which is in
                training mode.
            labels: int64 `(B,)`; with mixup class probabilities, float32 `(B, num_classes)`.

        Returns:
            Sums and counts, never means; see `result`.
        """

    def epoch_warnings(self, log: Mapping[str, Any]) -> list[str]:
        """Return warnings about an epoch that logged these values; `state.history` holds the
        values of the epochs before it."""
        return []

    def method_state(self) -> dict[str, Any]:
        """Return the state that the method carries from one minibatch to the next, as tensors and
        plain values, for checkpoints."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Continue from what `method_state` returned.

        Raises:
            ValueError: the state does not fit; the message says why.
        """

    # What a training method calls

    def update(self, losses: Tensor) -> None:
        """Take one optimizer step on the mean of `losses`, plus the penalty on the weights.

        Args:
            losses: `(B,)`, one per sample. The mean is that over the samples of all processes.

        Raises:
            NonFiniteError: the loss or a gradient is infinite or NaN, now or, on a GPU, since the
                guard last waited for it (see `NanGuard`). No parameter was updated from there on;
                running statistics, which the forward pass moves, were.
        """
        check_losses(losses, self._samples, f"{type(self).__name__}.train_batch: update takes")
        loss = self.shard(losses).mean(losses)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        # Before the step: a bad gradient must not reach weights and momentum
        self.nan_guard.check(self.model, loss, self.state, self.images)
        self.optimizer.step()
        # Each process has normalized other images
        distribute_bn(self.model)
        if self.ema is not None:
            self.ema.update()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of a training pass in the run's precision."""
        with self.autocast():
            return self.network(images)

    def result(self, losses: Tensor, logits: Tensor, labels: Tensor) -> BatchResult:
        """Return what one pass over a minibatch adds to the epoch: its loss and the config's
        metrics.

        Args:
            losses: `(B,)`, as they were given to `update`; the penalty is not logged.
            logits: `(B, num_classes)`.
            labels: as `train_batch` takes them.
        """
        claim = f"{type(self).__name__}.train_batch: result takes"
        return batch_result(losses, logits, labels, self.metrics, claim=claim)

    def shard(self, images: Tensor) -> Shard:
        """Return this process's shard of the current minibatch; with one process that is all of
        `images`."""
        if world_size() == 1:
            return Shard(len(images))
        batch_size = self.train_loader.batch_size
        # The last minibatch of an epoch may be smaller
        remaining = self.train_loader.n_samples - self.state.batches_done * batch_size
        return shard_of(min(batch_size, remaining))

    @property
    def minibatch(self) -> tuple[int, int]:
        """Epoch and number of the current minibatch, from which its random draws are derived."""
        return self.state.epochs_done + 1, self.state.batches_done

    def generator(self, purpose: str, images: Tensor) -> torch.Generator | Callable[..., Tensor]:
        """Return the source of the current minibatch's random numbers for `purpose`.

        With several processes it is a function (see `attacks.threat_model.Draw`), so that the
        numbers do not depend on how many processes there are. Within `train` on CUDA, a thread
        draws ahead for the next minibatch (see `DrawsAhead`), which changes no number.
        """
        is_last = self.state.batches_done + 1 >= len(self.train_loader)
        key = (self.config.seed, purpose, *self.minibatch)
        generator = self.draws_ahead.generator(key, is_last)
        shard = self.shard(images)
        if shard.processes == 1:
            return generator
        return ShardedGenerator(generator, shard).draw

    def autocast(self) -> AbstractContextManager:
        """Return the context for forward passes in the run's precision."""
        return autocast(self.device, self.precision)

    # The loop

    def train(self) -> None:
        """Train until the last epoch or the early stop.

        Raises:
            Stopped: a signal stopped the training; the state is saved.
            NonFiniteError: see `update` and `_check_epoch`; the last saved checkpoint is intact.
        """
        on_cuda = self.device.type == "cuda"
        self.network = wrap_ddp(self.model, self.config.system.gradient_compression)
        with self.signals.caught(), self.checkpoints.completed():
            # Now, so that a kill in the first epoch loses nothing, a full disk is found before an
            # epoch is spent, and a damaged file is replaced
            self.checkpoints.save_last(self.checkpoint())
            self.checkpoints.check_disk_space()
            while not self.finished:
                # Only around the minibatches: image workers are forked before an epoch's first draw
                # and during validation, and forking is unsafe while a thread is alive
                with self.draws_ahead.thread(self.device) if on_cuda else nullcontext():
                    log = self._train_epoch()
                log |= self._validate_epoch()
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

    def _train_epoch(self) -> dict[str, Any]:
        """Train on the epoch's minibatches, from the first that is not done yet."""
        self.model.train()
        state = self.state
        epoch = state.epochs_done + 1
        if state.batches_done == 0:
            state.learning_rate = self.schedule.learning_rate
        self.train_loader.set_epoch(epoch, first_batch=state.batches_done)
        bar = tqdm(
            self.train_loader,
            desc=f"epoch {epoch}/{self.config.trainer.epochs}{self._last_accuracies()}",
            total=len(self.train_loader),
            initial=state.batches_done,
            disable=hide_progress_bar(),
            leave=False,
        )
        begin = perf_counter()
        for images, labels in bar:
            images = to_device(images, self.device)
            labels = to_device(labels, self.device)
            shard = self.shard(images)
            self.images = images
            # Unlike autocast, TF32 has to be on in the backward pass, too
            with tf32() if self.precision == "tf32" else nullcontext():
                images, labels = self.mixup(images, labels)
                self._samples = len(images)
                result = self.train_batch(images, labels)
            _check_result(result, type(self).__name__)
            # Where every process computes the whole minibatch, one of them counts it
            if shard.counts:
                self.meters.add(result)
            self.schedule.step_batch()
            state.batches_done += 1
            state.images_seen += shard.total
            if not bar.disable and state.batches_done % 10 == 0:
                bar.set_postfix_str(format_values(self.meters.means()))
            # A thread may still be writing the last checkpoint
            self.checkpoints.poll()
            if self._asked_to_stop():
                state.train_seconds += perf_counter() - begin
                self._stop()
        self.nan_guard.check_pending()
        # Before the clock is read, as this waits for the device to finish
        means = self.meters.all_reduce().means()
        state.train_seconds += perf_counter() - begin
        broadcast_buffers(self.model)
        return {"epoch": epoch, "lr": state.learning_rate, **means}

    def mixup(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Average pairs of images, and of their labels, with one Beta(alpha, alpha) weight per
        minibatch (mixup, Zhang et al., arXiv:1710.09412), if the config enables it.

        Cross entropy is linear in the probabilities, so it is the weighted sum of the cross
        entropies with the two labels, in training and inside every attack.

        Args:
            images: `(B, C, H, W)`. With several processes the whole minibatch, as any image of it
                may be the partner of another.
            labels: int64 `(B,)`.

        Returns:
            Images and class probabilities `(B, num_classes)` of this process's shard; without
            mixup, the arguments.
        """
        alpha = self.config.augmentation.mixup_alpha
        if alpha == 0:
            return images, labels
        key = ("mixup", *self.minibatch)
        weight = float(numpy_generator(self.config.seed, *key).beta(alpha, alpha))
        generator = torch_generator(self.config.seed, *key)
        partner = to_device(torch.randperm(len(labels), generator=generator), labels.device)
        targets = F.one_hot(labels, self.train_loader.num_classes).to(images.dtype)
        part = self.shard(images).part
        partner = partner[part]
        mixed_images = torch.lerp(images[partner], images[part], weight)
        mixed_targets = torch.lerp(targets[partner], targets[part], weight)
        return mixed_images, mixed_targets

    def _last_accuracies(self) -> str:
        """The last epoch's validation accuracies, for the progress bar."""
        if not self.state.history:
            return ""
        log = self.state.history[-1]
        accuracies = {"clean": log.get("val_top1"), "robust": log.get("val_robust_top1")}
        known = [f"{value:.1%} {name}" for name, value in accuracies.items() if value is not None]
        if not known:
            return ""
        return f" (validation: {', '.join(known)})"

    def _check_epoch(self, log: Mapping[str, Any]) -> None:
        """Check that an epoch has not diverged, before it counts.

        Raises:
            NonFiniteError: a weight or a logged value is infinite or NaN; or, where nothing was
                validated, an answer of the model.
        """
        self.nan_guard.check_weights(self.model, self.state)
        self.nan_guard.check_values(self.model, self.state, self.images, log)
        if "val_loss" not in log:
            self.nan_guard.check_outputs(self.model, self.state, self.images)

    def _finish_epoch(self, log: dict[str, Any]) -> None:
        """Count the epoch, save it and log it."""
        self.schedule.step_epoch(log)
        self.meters = Meters()
        # Before the epoch joins the history that it is compared with
        for warning in self.epoch_warnings(log):
            logger.warning(warning)
        improved = self.state.finish_epoch(log, self.config.trainer.monitor)

        def log_it() -> None:
            self.trackers.log_epoch(log)
            logger.info("%s%s", format_values(log), "  (best)" if improved else "")

        # Logged after the checkpoint: a run that is killed before it is saved trains the epoch
        # again, and would log it twice
        self.checkpoints.save_epoch(self.checkpoint(), self.state.epochs_done, improved, log_it)

    # Validation

    def validate(self) -> dict[str, float]:
        """Return values on the held-out images. Their names begin with `val_`, and for the averaged
        weights with `val_ema_`."""
        epoch = self.state.epochs_done + 1
        values = {}
        for name, value in self.validate_model(self.model, epoch).items():
            values[f"val_{name}"] = value
        if self.ema is not None:
            for name, value in self.validate_model(self.ema.model, epoch).items():
                values[f"val_ema_{name}"] = value
        return values

    def _validate_epoch(self) -> dict[str, float]:
        """Call `validate`; a signal ends it at once, as an attack may take longer than a cluster
        waits.

        The state after the epoch's last minibatch is saved then, and a resumed run validates again.
        """
        # A process that left alone would leave the others waiting
        if world_size() > 1:
            return self.validate()
        try:
            with self.signals.interrupting():
                return self.validate()
        except Interrupted:
            self._stop()

    # Signals

    def _asked_to_stop(self) -> bool:
        """Return whether a signal has reached any process: all stop after the same minibatch.

        Several processes find out after every 8th minibatch, sooner where minibatches take long,
        and at the end of an epoch, before and after its validation; see `StopQuestions`.
        """
        at_end = self.state.batches_done in (0, len(self.train_loader))
        if not self.stop_questions.due(at_end):
            return False
        asked = self.stop_questions.ask(self.signals.asked)
        if asked == 0:
            # A signal may have come since: signals.asked stays as it is for the next call
            return False
        self.signals.asked = asked
        return True

    def _stop(self) -> NoReturn:
        """Save, in the middle of an epoch or after one, and leave.

        Raises:
            Stopped: the state is saved.
            NonFiniteError: the model diverged in the last update; nothing is saved.
        """
        self.nan_guard.check_pending()
        if self.state.batches_done:
            # An epoch that is not finished has not been checked yet
            self.nan_guard.check_weights(self.model, self.state)
            self.nan_guard.check_outputs(self.model, self.state, self.images)
        self.checkpoints.save_last(self.checkpoint())
        self.checkpoints.join()
        exit_unless_primary(128 + self.signals.asked)
        epochs = counted(self.state.epochs_done, "epoch")
        batches = counted(self.state.batches_done, "batch")
        name = signal.Signals(self.signals.asked).name
        raise Stopped(
            f"stopped by {name} after {epochs} and {batches}; continue with -r {self.folder}",
            self.signals.asked,
        )

    # Checkpoint and resume

    def checkpoint(self) -> dict[str, Any]:
        """Return everything that `resume` and readers of the weights need.

        It does not depend on the number of processes, all of which call it.

        Raises:
            NonFiniteError: see `update`.
        """
        self.nan_guard.check_pending()
        self.nan_guard.record_saved(self.state)
        contents = dict(self.metadata)
        if self.ema is not None:
            contents["ema_state_dict"] = self.ema.model.state_dict()
            contents["ema_updates"] = self.ema.updates
        contents |= {
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
        return contents

    def resume(self, checkpoint: Mapping[str, Any], source: Path) -> str | None:
        """Continue from a checkpoint of this run; return a warning, or None.

        No file is written before everything has been checked.

        Args:
            checkpoint: as `base.checkpoint.schema.check_training_state` has checked it.
            source: its file.

        Raises:
            CheckpointError: it does not fit this model, optimizer, schedule or training method.
            NonFiniteError: its weights are infinite or NaN.
        """
        self._check_types(checkpoint, source)
        self.state = TrainState(**checkpoint["progress"])
        self._restore_weights_and_optimizer(checkpoint, source)
        # The saved sums are those of all processes
        if is_primary():
            self.meters.load_state_dict(checkpoint["totals"], self.device)
        try:
            self.load_method_state(checkpoint.get("method", {}))
        except ValueError as error:
            raise CheckpointError(f"{source}: method: {error}") from None
        self._restore_ema(checkpoint, source)
        self._restore_generators(checkpoint["rng"], source)
        return self.checkpoints.restore_names(self.state, source, finished=self.finished)

    def _check_types(self, checkpoint: Mapping[str, Any], source: Path) -> None:
        """Check that the checkpoint is of this kind of optimizer and schedule."""
        types = {
            "optimizer_type": type(self.optimizer).__name__,
            "scheduler_type": self.config.lr_scheduler.type,
        }
        for key, expected in types.items():
            if checkpoint[key] != expected:
                found = one_line(checkpoint[key], 80)
                raise CheckpointError(
                    f"{source}: was trained with {key} {found}, this config has {expected}"
                )

    def _restore_weights_and_optimizer(self, checkpoint: Mapping[str, Any], source: Path) -> None:
        state = self.state
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
        bad = first_bad_weight(self.model)
        if bad is not None:
            raise NonFiniteError(
                f"{source}: {bad} is not finite: the run has diverged there; name an earlier"
                " checkpoint"
            )
        load_optimizer(self.optimizer, optimizer)
        self.schedule.load_state_dict(schedule)
        self.nan_guard.reset()

    def _restore_ema(self, checkpoint: Mapping[str, Any], source: Path) -> None:
        if self.ema is None:
            return
        for key in ("ema_state_dict", "ema_updates"):
            if key not in checkpoint:
                raise CheckpointError(
                    f"{source}: {key!r} is missing, but trainer.ema_decay needs averaged weights"
                )
        self.ema.load_state_dict(checkpoint["ema_state_dict"], checkpoint["ema_updates"], source)

    def _restore_generators(self, states: Mapping[str, Any], source: Path) -> None:
        """Restore torch's global generators; with several processes `states` are those of rank
        0."""

        def restore() -> None:
            try:
                set_rng_state(states)
            except (RuntimeError, TypeError) as error:
                reason = first_line(error)
                raise CheckpointError(
                    f"{source}: rng: is not a valid state of a torch generator: {reason}"
                ) from None

        from_primary(restore)
        if not is_primary():
            # Copies of a model must not drop the same units
            state = self.state
            seed_global_generators(
                self.config.seed, f"training {rank()} {state.epochs_done} {state.batches_done}"
            )


def _check_result(result: object, method: str) -> None:
    """Check that `train_batch` has returned a `BatchResult`.

    Raises:
        ConfigError: naming the training method.
    """
    if not isinstance(result, BatchResult):
        raise ConfigError(
            f"{method}.train_batch: returns a {type(result).__name__}, not a BatchResult, such as"
            " self.result(losses, logits, labels)"
        )
