"""No update on numbers that are infinite or NaN, no checkpoint of a model that answers with them,
and no waiting for the GPU in every step to know."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.diagnosis import first_bad_layer, first_bad_output, first_bad_weight
from base.distributed import all_reduce_max, exit_unless_primary
from base.errors import NonFiniteError
from base.run_folder.names import LAST
from base.train_state import TrainState, not_finite

READ_EVERY = 50
"""Updates between two looks of the host at the device, where they are deferred."""
OF_LAST_EPOCH = "is of the last good epoch"
"""What `model_last.pth` is after every epoch."""


class NanGuard:
    """Keeps an optimizer from ever updating on gradients that are infinite or NaN, and ends
    training where they are.

    On the CPU it looks before every update. On a GPU that would let the host wait for the device in
    every step, while it could prepare the next one. There a fused optimizer is told on the device
    (`found_inf`): from the first bad update on it changes nothing any more, neither weights nor its
    own state, and the host looks every `READ_EVERY` updates, at the end of an epoch and before
    every checkpoint. What moves until then, running statistics and averaged weights, is never
    saved. Optimizers without such kernels, and runs that began without them, are looked after
    before every update on a GPU, too.

    Several processes judge the same gradients, averaged over all, and so agree.

    Args:
        optimizer: whose updates are guarded.
        folder: the run folder, for the message.
    """

    deferred_on: tuple[str, ...] = ("cuda",)

    def __init__(self, optimizer: Optimizer, folder: Path) -> None:
        self.optimizer = optimizer
        self.folder = folder
        # int64 on the device: the batch from 1 on; 0 as long as all is well
        self._first_bad: Tensor | None = None
        # model, loss, epoch and images of the last update
        self._last: tuple[nn.Module, Tensor, int, Tensor | None]
        self._unread = 0
        self._saved = OF_LAST_EPOCH

    def look(
        self, model: nn.Module, loss: Tensor, state: TrainState, images: Tensor | None = None
    ) -> None:
        """Judge the gradients that the backward pass of `loss` (0-dim) has left, before the
        optimizer's step. They are NaN where the loss is not finite (see `BaseTrainer.update`);
        `images` are the minibatch, for the message.

        Raises:
            NonFiniteError: see `read`.
        """
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.int64, device=finite.device)
        self._first_bad = torch.where(
            finite | (self._first_bad > 0), self._first_bad, state.batches_done + 1
        )
        self._last = (model, loss.detach(), state.epochs_done + 1, images)
        self._unread += 1
        deferred = self.deferred(loss.device)
        self.optimizer.found_inf = (self._first_bad > 0).float() if deferred else None
        if self._unread >= (READ_EVERY if deferred else 1):
            self.read()

    def deferred(self, device: torch.device) -> bool:
        """Whether the optimizer leaves out bad updates by itself. Its groups are asked, too: a
        resumed run brings its own."""
        # torch's own sign, for loss scaling
        heeds = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return (
            device.type in self.deferred_on
            and heeds
            and all(group.get("fused") for group in self.optimizer.param_groups)
        )

    def read(self) -> None:
        """Wait for the device and ask whether all is well. An epoch's updates are read before the
        next begins.

        Raises:
            NonFiniteError: the loss or a gradient was infinite or NaN. The message names the first
            such batch, and the layer where it began (see `base.diagnosis`). Where later passes with
            the same weights have replaced those gradients and are well again, the images were to
            blame, and it names the batch only.
        """
        if self._unread == 0:
            return
        batch = int(self._first_bad)
        if batch:  # and whoever asks again hears it again
            model, loss, epoch, images = self._last
            where = first_bad_layer(model, images)
            if where is None:
                what = "the loss or the gradient is not finite"
            else:
                what = f"the {'gradient' if torch.isfinite(loss) else 'loss'} is not finite, first in {where}"
            exit_unless_primary(NonFiniteError.exit_code)
            kept = self._kept()
            raise NonFiniteError(
                f"epoch {epoch}, batch {batch}: {what}: training stopped before the update{kept}"
            )
        self._unread = 0

    def check_weights(self, model: nn.Module, state: TrainState) -> None:
        """Make sure that what a checkpoint would hold now is finite: an update on finite gradients
        may still carry weights or running statistics beyond the range of their type.

        Raises:
            NonFiniteError: naming the epoch, the last batch done in it, and the tensor.
        """
        where = first_bad_weight(model)
        if where is not None:
            self._refuse(state, f"{where} is not finite after its update")

    def check_answers(self, model: nn.Module, state: TrainState, images: Tensor | None) -> None:
        """Make sure that the model, in evaluation mode, answers the last minibatch with finite
        numbers: weights that have exploded may be finite themselves. Where several processes train,
        all of them call it, each with its share of the images.

        Raises:
            NonFiniteError: naming the epoch, the last batch done in it, and the first bad layer.
        """
        where = None if images is None else self._first_bad_answer(model, images)
        if all_reduce_max(int(where is not None)):
            where = where or "what another process computes"
            self._refuse(
                state, f"the model's answers are not finite after its update, first in {where}"
            )

    def check_values(
        self,
        model: nn.Module,
        state: TrainState,
        images: Tensor | None,
        values: Mapping[str, Any],
    ) -> None:
        """Make sure that an epoch's values, which are those of all processes, are finite.

        Raises:
            NonFiniteError: naming the epoch, its last batch, the value and the first bad layer.
        """
        bad = not_finite(values)
        if bad:
            where = None if images is None else self._first_bad_answer(model, images)
            begin = "" if where is None else f", first in {where}"
            self._refuse(state, f"{bad[0]} is not finite after its update{begin}")

    @staticmethod
    def _first_bad_answer(model: nn.Module, images: Tensor) -> str | None:
        was_training = model.training
        model.eval()
        try:
            return first_bad_output(model, images)
        finally:
            model.train(was_training)

    def _refuse(self, state: TrainState, what: str) -> NoReturn:
        """End training after the last batch done, whose update was applied."""
        exit_unless_primary(NonFiniteError.exit_code)
        place = f"epoch {state.epochs_done + 1}, batch {state.batches_done}"
        raise NonFiniteError(f"{place}: {what}: training stopped{self._kept()}")

    def _kept(self) -> str:
        last = self.folder / LAST
        return f"; {last} {self._saved}" if last.exists() else ""

    def note_saved(self, state: TrainState) -> None:
        """Remember for the message what `model_last.pth` holds from now on."""
        if state.batches_done:
            self._saved = f"is of epoch {state.epochs_done + 1}, batch {state.batches_done}"
        elif state.epochs_done:
            self._saved = OF_LAST_EPOCH
        else:
            self._saved = "holds the weights that training began with"

    def forget(self) -> None:
        """Start over, with weights and optimizer from a checkpoint."""
        self._first_bad, self._unread = None, 0
