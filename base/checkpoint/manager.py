"""The checkpoints of a run folder: which are written when, and that the best one is the best."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from base.checkpoint.checkpoint import (
    BEST,
    LAST,
    NUMBERED,
    keep_newest,
    load_checkpoint,
    numbered,
    publish_copy,
    save_checkpoint,
)
from base.config.training import TrainerConfig
from base.distributed import from_primary, is_primary
from base.errors import CheckpointError
from base.train_state import TrainState


class CheckpointManager:
    """`model_last.pth`, `model_best.pth` and the numbered ones in `folder`. Every process calls its
    methods, rank 0 writes."""

    def __init__(self, folder: Path, settings: TrainerConfig) -> None:
        self.folder = folder
        self.settings = settings

    def save_last(self, contents: Mapping[str, Any]) -> None:
        """Write `model_last.pth`."""
        if is_primary():
            save_checkpoint(self.folder / LAST, contents)

    def refuse_full_disk(self) -> None:
        """Make sure, when `model_last.pth` has been written, that there is room for the next one
        beside it.

        Raises:
            CheckpointError: the disk is too full.
        """
        from_primary(self._refuse_full_disk)

    def _refuse_full_disk(self) -> None:
        needed, free = (self.folder / LAST).stat().st_size, shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: its disk is full: a checkpoint takes {needed / 1e6:.1f} MB beside the last one,"
                f" {free / 1e6:.1f} MB are free"
            )

    def save_epoch(self, contents: Mapping[str, Any], epoch: int, improved: bool) -> None:
        """Write what a finished epoch leaves: the last checkpoint, the best where it `improved`,
        every `save_period` epochs a numbered one."""
        if not is_primary():
            return
        last = self.folder / LAST
        save_checkpoint(last, contents)
        if improved:
            publish_copy(last, self.folder / BEST)
        if epoch % self.settings.save_period == 0:
            publish_copy(last, self.folder / NUMBERED.format(epoch))
        if self.settings.keep_checkpoints:
            keep_newest(self.folder, self.settings.keep_checkpoints, epoch)

    def restore_best(self, state: TrainState, source: Path, *, finished: bool) -> str | None:
        """Make sure that `model_best.pth` is the best model of the run as far as it is resumed from
        `source`.

        It may be of an epoch that the run, resumed from an earlier checkpoint, has yet to do again.
        Then `progress` knows no best model until there is one anew, which on the same machine is
        the same one. Or it may be lost: then the best is one of the epochs that follow, and
        `state.best_since` says so.

        Args:
            state: of the checkpoint `source`; changed in these two cases.
            source: the checkpoint.
            finished: no epoch follows.

        Returns:
            What there is to warn of in these two cases.

        Raises:
            CheckpointError: the best model of a finished run is lost.
        """
        best, warning = state.best_epoch, None
        found = from_primary(lambda: self._restored(state, source))
        if found == "to come":
            warning = (
                f"the best model so far, of epoch {best}, has been replaced by a better one, of an epoch that is done again:"
                " until then the best is chosen anew"
            )
        elif found == "lost":
            lost = f"{source}: its best model so far is of epoch {best}, but {self.folder / BEST} is not"
            if finished:
                raise CheckpointError(lost)
            state.best_since = state.epochs_done + 1
            warning = f"{lost}: it is lost, and the best model is chosen among the epochs from {state.best_since} on"
        if warning:
            state.best_value = state.best_epoch = None
        return warning

    def _restored(self, state: TrainState, source: Path) -> Literal["there", "to come", "lost"]:
        """Whether the best model is now there, or of an epoch that comes again, or lost."""
        best, last = self.folder / BEST, self.folder / LAST
        if state.best_epoch is None:
            return "there"
        if state.best_epoch == state.epochs_done and state.batches_done == 0:
            if source.resolve() != best.resolve():
                publish_copy(source, best)  # it may not have come to that when the run was killed
            return "there"
        later = _epoch_of(best)
        if later == state.best_epoch:
            return "there"
        copy = self.folder / NUMBERED.format(state.best_epoch)
        if _epoch_of(copy) == state.best_epoch:
            publish_copy(copy, best)
            return "there"
        to_come = [
            last,
            *(file for epoch, file in numbered(self.folder).items() if epoch > state.epochs_done),
        ]
        if (
            later is None
            and best.is_file()
            and any(file.is_file() and best.samefile(file) for file in to_come)
        ):
            # that epoch was the best one, and all its names are of one damaged file
            return "to come"
        return (
            "to come"
            if later is not None and state.epochs_done < later <= self.settings.epochs
            else "lost"
        )


def _epoch_of(file: Path) -> int | None:
    """The epoch of a checkpoint; None where there is no good one."""
    try:
        return load_checkpoint(file).get("epoch")
    except CheckpointError:
        return None
