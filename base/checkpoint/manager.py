"""Write and delete the checkpoints of a run folder, and restore its best one on resume."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

from base.atomic import link_or_copy
from base.checkpoint.checkpoint import load_checkpoint
from base.checkpoint.find import numbered_checkpoints
from base.checkpoint.writer import CheckpointWriter
from base.config.training import TrainerConfig
from base.distributed import from_primary, is_primary
from base.errors import CheckpointError
from base.run_folder.names import BEST, LAST, NUMBERED
from base.text import first_line
from base.train_state import TrainState

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Writes `model_last.pth`, `model_best.pth` and numbered checkpoints into a run folder.

    Every rank calls its methods; only rank 0 writes, in a thread (see `CheckpointWriter`). Each
    save waits for the one before, and `join` for the last.

    Args:
        folder: the run folder.
        settings: how often numbered checkpoints are written and how many are kept.
    """

    def __init__(self, folder: Path, settings: TrainerConfig) -> None:
        self.folder = folder
        self.settings = settings
        self.writer = CheckpointWriter()

    def save_last(self, contents: Mapping[str, Any]) -> None:
        """Begin to write `model_last.pth`."""
        if is_primary():
            self.writer.write(self.folder / LAST, contents)

    def poll(self) -> None:
        """Raise what the last save raised, or log its epoch, if it has ended; never wait.

        Raises:
            CheckpointError: a file could not be written.
        """
        self.writer.poll()

    def join(self) -> None:
        """Wait until the last save is complete.

        Raises:
            CheckpointError: a file could not be written.
        """
        self.writer.join()

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Complete the last save when the context ends, also with an exception.

        Raises:
            CheckpointError: a file could not be written. If the context has raised another
                exception, this is logged instead.
        """
        try:
            yield
        except BaseException:
            try:
                self.join()
            except Exception as error:
                # The log may lie on the disk that is full
                with suppress(OSError):
                    logger.warning("%s", first_line(error))
            raise
        self.join()

    def check_disk_space(self) -> None:
        """Check that the disk has room for another checkpoint beside `model_last.pth`.

        Raises:
            CheckpointError: the disk is too full.
        """
        from_primary(self._check_disk_space)

    def _check_disk_space(self) -> None:
        self.join()
        # The old file stays until the new one is complete, so both need room
        needed = (self.folder / LAST).stat().st_size
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: its disk is full: a checkpoint takes {needed / 1e6:.1f} MB beside"
                f" the last one, {free / 1e6:.1f} MB are free"
            )

    def save_epoch(
        self,
        contents: Mapping[str, Any],
        epoch: int,
        improved: bool,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write the checkpoints of a finished epoch.

        These are the last one, the best one if the epoch `improved` on it, and a numbered one every
        `save_period` epochs. Numbered ones beyond `keep_checkpoints` are deleted. `then` is called
        when all of this is done, by the next `poll`, `join` or save.
        """
        if not is_primary():
            return
        self.writer.write(
            self.folder / LAST, contents, lambda: self._publish(epoch, improved), then
        )

    def _publish(self, epoch: int, improved: bool) -> None:
        """Give `model_last.pth` its further names, and delete old numbered checkpoints."""
        for name in self._names(epoch, improved):
            publish_copy(self.folder / LAST, self.folder / name)
        if self.settings.keep_checkpoints:
            keep_newest(self.folder, self.settings.keep_checkpoints, epoch)

    def _names(self, epoch: int, improved: bool) -> list[str]:
        """Return the names that the checkpoint of a finished epoch gets beside `model_last.pth`."""
        names = []
        if improved:
            names.append(BEST)
        if epoch % self.settings.save_period == 0:
            names.append(NUMBERED.format(epoch))
        return names

    def restore_names(self, state: TrainState, source: Path, *, finished: bool) -> str | None:
        """Give `source` the names that a killed run did not get to, and make sure that
        `model_best.pth` is the best model of the epochs done up to `source`.

        That file may be lost, or be of an epoch after `source`, which the run will do again. In
        both cases `state` forgets its best model, and the best is chosen among the epochs that
        follow. If it is lost, `state.best_since` records the first of them.

        Args:
            state: of the checkpoint `source`.
            source: the checkpoint that the run is resumed from.
            finished: whether no epoch follows.

        Returns:
            A warning in these two cases, otherwise None.

        Raises:
            CheckpointError: the best model of a finished run is lost.
        """
        found = from_primary(lambda: self._restore_names(state, source))
        if found is _Best.PRESENT:
            return None
        best_epoch = state.best_epoch
        if found is _Best.REPLACED:
            warning = (
                f"the best model so far, of epoch {best_epoch}, has been replaced by a better one,"
                " of an epoch that is done again: the best model is now chosen among the epochs"
                " that follow"
            )
        else:
            lost = (
                f"{source}: its best model so far is of epoch {best_epoch},"
                f" but {self.folder / BEST} is not"
            )
            if finished:
                raise CheckpointError(lost)
            state.best_since = state.epochs_done + 1
            warning = (
                f"{lost}: it is lost, and the best model is chosen among the epochs from"
                f" {state.best_since} on"
            )
        state.best_value = None
        state.best_epoch = None
        return warning

    def _restore_names(self, state: TrainState, source: Path) -> "_Best":
        epoch = state.epochs_done
        if epoch > 0 and state.batches_done == 0:
            for name in self._names(epoch, improved=state.best_epoch == epoch):
                target = self.folder / name
                if source.resolve() != target.resolve():
                    publish_copy(source, target)
        return self._find_best(state)

    def _find_best(self, state: TrainState) -> "_Best":
        """Find the best model of `state`; restore `model_best.pth` if a copy of it remains."""
        best = self.folder / BEST
        if state.best_epoch is None:
            return _Best.PRESENT
        epoch_of_best = _epoch_of(best)
        if epoch_of_best == state.best_epoch:
            return _Best.PRESENT
        copy = self.folder / NUMBERED.format(state.best_epoch)
        if _epoch_of(copy) == state.best_epoch:
            publish_copy(copy, best)
            return _Best.PRESENT
        if epoch_of_best is None:
            is_later = self._is_later(best, state)
        else:
            is_later = state.epochs_done < epoch_of_best <= self.settings.epochs
        if is_later:
            return _Best.REPLACED
        return _Best.LOST

    def _is_later(self, best: Path, state: TrainState) -> bool:
        """Return whether an unreadable best checkpoint is of an epoch that the run does again."""
        if not best.is_file():
            return False
        later = [self.folder / LAST]
        for epoch, file in numbered_checkpoints(self.folder).items():
            if epoch > state.epochs_done:
                later.append(file)
        # The names of one checkpoint are links to one file, so they are damaged together
        return any(file.is_file() and best.samefile(file) for file in later)


class _Best(Enum):
    PRESENT = auto()
    REPLACED = auto()
    """It is of an epoch that the run does again."""
    LOST = auto()


def publish_copy(source: Path, target: Path) -> None:
    """Give a saved checkpoint a second name: a hard link, or a copy if the file system has none.

    Raises:
        CheckpointError: the folder cannot be written; an older `target` is untouched.
    """
    try:
        link_or_copy(source, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {first_line(error)}") from error


def keep_newest(folder: Path, count: int, epoch: int) -> None:
    """Delete all but the `count` newest numbered checkpoints up to `epoch` from a run folder."""
    # Those of later epochs, which a resumed run does again, stay until it overwrites them
    by_age = sorted(numbered_checkpoints(folder).items(), reverse=True)
    old = [path for number, path in by_age if number <= epoch]
    for path in old[count:]:
        path.unlink(missing_ok=True)


def _epoch_of(file: Path) -> int | None:
    """Return the epoch of a checkpoint; None if it is missing or damaged."""
    try:
        return load_checkpoint(file).get("epoch")
    except CheckpointError:
        return None
