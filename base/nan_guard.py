"""NanGuard: it stops training before numbers that are infinite or NaN reach an update or a
checkpoint, and does not wait for the GPU in every step."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.distributed import all_reduce_max, all_reduce_min, exit_unless_primary
from base.errors import NonFiniteError
from base.run_folder.names import LAST
from base.seeding import get_rng_state, set_rng_state
from base.train_state import TrainState, not_finite

READ_EVERY = 50
"""Updates after which the host waits for the device, where it need not wait for each of them."""
OF_LAST_EPOCH = "is of the last good epoch"
"""What messages say of `model_last.pth` after an epoch."""


class NanGuard:
    """Keeps an optimizer from updating on gradients that are infinite or NaN, and ends training.

    On the CPU it judges every update before it happens. On a GPU the host would have to wait for
    the device in every step. There the guard sets the optimizer's `found_inf`, as torch's own loss
    scaling does, and from the first bad update on, a fused optimizer changes neither weights nor
    its own state. The host asks every `READ_EVERY` updates, at the end of an epoch and before every
    checkpoint. Running statistics and averaged weights do move until then, but are not saved.

    An optimizer without fused kernels is guarded as on the CPU.

    Args:
        optimizer: whose updates are guarded.
        folder: the run folder, for messages.
    """

    deferred_on: tuple[str, ...] = ("cuda",)
    """Types of devices for which the host need not wait in every step."""

    def __init__(self, optimizer: Optimizer, folder: Path) -> None:
        self.optimizer = optimizer
        self.folder = folder
        # int64 on the device: the first bad batch of the epoch, counted from 1; 0 for none
        self._first_bad: Tensor | None = None
        # Model, loss, epoch and images of the last update
        self._last: tuple[nn.Module, Tensor, int, Tensor | None]
        # Updates that the host has not asked about yet
        self._pending = 0
        self._saved = OF_LAST_EPOCH

    def check(
        self, model: nn.Module, loss: Tensor, state: TrainState, images: Tensor | None = None
    ) -> None:
        """Judge an update, between the backward pass and the optimizer's step.

        Args:
            model: with the gradients of `loss`.
            loss: 0-dim.
            state: tells epoch and batch.
            images: the minibatch, for the message.

        Raises:
            NonFiniteError: see `check_pending`.
        """
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        # One number for all gradients: a single bad one makes their norm infinite or NaN
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        # Gradients are averages over all processes, but each process knows only its own loss, and
        # all have to stop at the same update
        finite = all_reduce_min(finite.long()) > 0
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.int64, device=finite.device)
        batch = state.batches_done + 1
        self._first_bad = torch.where(finite | (self._first_bad > 0), self._first_bad, batch)
        self._last = (model, loss.detach(), state.epochs_done + 1, images)
        self._pending += 1
        if self.deferred(loss.device):
            self.optimizer.found_inf = (self._first_bad > 0).float()
            if self._pending >= READ_EVERY:
                self.check_pending()
        else:
            self.optimizer.found_inf = None
            self.check_pending()

    def deferred(self, device: torch.device) -> bool:
        """Return whether the optimizer skips bad updates by itself."""
        # This attribute is how torch's GradScaler recognizes such an optimizer
        skips = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        # The groups are asked, too, as a resumed run brings its own
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        return device.type in self.deferred_on and skips and fused

    def check_pending(self) -> None:
        """Wait for the device and check the updates since the last call.

        Raises:
            NonFiniteError: the loss or a gradient was infinite or NaN. The message names the first
                such batch and the layer where the bad numbers began. The layer is searched for with
                the images and gradients of the last update; if these are good, the message names
                the batch only.
        """
        if self._pending == 0:
            return
        batch = int(self._first_bad)
        if batch == 0:
            self._pending = 0
            return
        # _pending is not reset, so that every later call fails, too
        model, loss, epoch, images = self._last
        where = first_bad_layer(model, images)
        if where is None:
            what = "the loss or the gradient is not finite"
        elif torch.isfinite(loss):
            what = f"the gradient is not finite, first in {where}"
        else:
            what = f"the loss is not finite, first in {where}"
        self._stop(f"epoch {epoch}, batch {batch}: {what}: training stopped before the update")

    def check_weights(self, model: nn.Module, state: TrainState) -> None:
        """Check parameters and buffers before a checkpoint is written: an update on finite
        gradients may still carry them beyond the range of their type.

        Raises:
            NonFiniteError: naming the epoch, the last batch done in it, and the tensor.
        """
        where = first_bad_weight(model)
        if where is not None:
            self._stop_after_update(state, f"{where} is not finite after its update")

    def check_outputs(self, model: nn.Module, state: TrainState, images: Tensor | None) -> None:
        """Check that the model, in evaluation mode, answers the last minibatch with finite numbers:
        weights that have exploded may be finite themselves.

        Every process calls it, each with its shard of the images.

        Raises:
            NonFiniteError: naming the epoch, the last batch done in it, and the first bad layer.
        """
        where = _first_bad_output_in_evaluation(model, images)
        if all_reduce_max(int(where is not None)):
            where = where or "what another process computes"
            self._stop_after_update(
                state, f"the model's answers are not finite after its update, first in {where}"
            )

    def check_values(
        self,
        model: nn.Module,
        state: TrainState,
        images: Tensor | None,
        values: Mapping[str, Any],
    ) -> None:
        """Check an epoch's values, which are those of all processes.

        Raises:
            NonFiniteError: naming the epoch, its last batch, the value and the first bad layer.
        """
        bad = not_finite(values)
        if not bad:
            return
        where = _first_bad_output_in_evaluation(model, images)
        place = f", first in {where}" if where else ""
        self._stop_after_update(state, f"{bad[0]} is not finite after its update{place}")

    def _stop_after_update(self, state: TrainState, what: str) -> NoReturn:
        place = f"epoch {state.epochs_done + 1}, batch {state.batches_done}"
        self._stop(f"{place}: {what}: training stopped")

    def _stop(self, message: str) -> NoReturn:
        exit_unless_primary(NonFiniteError.exit_code)
        last = self.folder / LAST
        if last.exists():
            message += f"; {last} {self._saved}"
        raise NonFiniteError(message)

    def record_saved(self, state: TrainState) -> None:
        """Remember for messages what `model_last.pth` holds from now on."""
        if state.batches_done:
            self._saved = f"is of epoch {state.epochs_done + 1}, batch {state.batches_done}"
        elif state.epochs_done:
            self._saved = OF_LAST_EPOCH
        else:
            self._saved = "holds the weights that training began with"

    def reset(self) -> None:
        """Start over, with weights and optimizer from a checkpoint."""
        self._first_bad = None
        self._pending = 0


def first_bad_layer(model: nn.Module, images: Tensor | None) -> str | None:
    """Return where numbers first became infinite or NaN on the way from the pixels to the logits
    and back, such as `the output of layer1.0.bn1 (BatchNorm2d)`; None if all are finite.

    The images go through the network once more, which leaves no trace in it. If all outputs are
    finite, or `images` is None, the gradients are searched, from the last layer to the first.

    Args:
        model: after the backward pass.
        images: `(B, C, H, W)` of the minibatch as it was loaded. Where bad numbers begin only at
            attacked or mixed images, all outputs for these are finite.
    """
    if images is not None:
        output = first_bad_output(model, images)
        if output is not None:
            return output
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return None


def first_bad_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter, or else buffer, that holds an infinite number or a
    NaN; None if all are finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            return name
    return None


@torch.no_grad()
def first_bad_output(model: nn.Module, images: Tensor) -> str | None:
    """Return the first layer whose output for these images `(B, C, H, W)` is not finite, such as
    `the output of conv1 (Conv2d)`; None if all are finite.

    Layers that contain others are left out. The pass leaves no trace in the model, whose mode it
    keeps, nor in torch's generators.
    """
    bad: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not bad and isinstance(output, Tensor) and not torch.isfinite(output).all():
            bad.append(f"the output of {name} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    rng_state = get_rng_state()
    try:
        # Not model(images), which may be compiled and then calls no hooks
        model.forward(images)
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            # Not `copy_`: the pass may have given the buffer another size.
            buffer.data = before
        set_rng_state(rng_state)
    return next(iter(bad), None)


def _first_bad_output_in_evaluation(model: nn.Module, images: Tensor | None) -> str | None:
    """`first_bad_output` in evaluation mode; None without images."""
    if images is None:
        return None
    was_training = model.training
    model.eval()
    try:
        return first_bad_output(model, images)
    finally:
        model.train(was_training)
