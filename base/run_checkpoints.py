"""The checkpoints of a run folder: which are written when, and that the best one is the best."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.checkpoint import BEST, LAST, NUMBERED, keep_newest, load_checkpoint, publish_copy, save_checkpoint
from base.config_training import TrainerConfig
from base.errors import CheckpointError
from base.progress import Progress
from base.ranks import rank


class RunCheckpoints:
    """`model_last.pth`, `model_best.pth` and the numbered ones in `folder`. Every process calls its methods, rank 0 writes."""

    def __init__(self, folder: Path, settings: TrainerConfig) -> None:
        self.folder = folder
        self.settings = settings

    def save_last(self, contents: Mapping[str, Any]) -> None:
        """Write `model_last.pth`."""
        if rank() == 0:
            save_checkpoint(self.folder / LAST, contents)

    def save_epoch(self, contents: Mapping[str, Any], epoch: int, improved: bool) -> None:
        """Write what a finished epoch leaves: the last checkpoint, the best where it `improved`, every `save_period` epochs a
        numbered one."""
        if rank() > 0:
            return
        last = self.folder / LAST
        save_checkpoint(last, contents)
        if improved:
            publish_copy(last, self.folder / BEST)
        if epoch % self.settings.save_period == 0:
            publish_copy(last, self.folder / NUMBERED.format(epoch))
        if self.settings.keep_checkpoints:
            keep_newest(self.folder, self.settings.keep_checkpoints, epoch)

    def restore_best(self, progress: Progress, source: Path) -> None:
        """Make sure that `model_best.pth` is the best model of the run as far as it is resumed from `source`.

        Raises:
            CheckpointError: it is of another epoch.
        """
        best = self.folder / BEST
        if progress.best_epoch is None or rank() > 0:
            return
        if progress.best_epoch == progress.epochs_done and progress.batches_done == 0:
            if source.resolve() != best.resolve():
                publish_copy(source, best)  # it may not have come to that when the run was killed
        elif not best.is_file() or load_checkpoint(best)["epoch"] != progress.best_epoch:
            raise CheckpointError(f"{source}: its best model so far is of epoch {progress.best_epoch}, but {best} is not")
