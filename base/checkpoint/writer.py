"""CheckpointWriter: copies a training state, and writes the copy while training goes on."""

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from base.checkpoint.checkpoint import plain, save_checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own.

    `write` returns as soon as every tensor is copied to the host's memory; the copy stays there
    until it is on the disk. The next `join` raises whatever the thread has raised. Before this
    process forks (as it does to start image workers), it waits for the thread, so that no child
    process inherits a lock that the thread holds.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._then: Callable[[], None] | None = None
        _writers.add(self)

    def write(
        self,
        path: Path,
        contents: Mapping[str, Any],
        publish: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Wait for the checkpoint before, and begin to write this one.

        Args:
            path: the file.
            contents: as `save_checkpoint` takes them. They may change as soon as this returns.
            publish: called in the thread once the file is complete.
            then: called by the `join` or the `poll` that finds everything complete, in its thread.

        Raises:
            CheckpointError: see `join`.
        """
        self.join()
        # After the join, so that the memory holds one copy and not two
        copy = plain(contents, _host_copy)
        self._then = then
        thread = Thread(
            target=self._run, args=(path, copy, publish), name="checkpoint", daemon=True
        )
        self._thread = thread
        thread.start()

    def poll(self) -> None:
        """`join` if the thread has finished; never wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()

    def join(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            CheckpointError: it could not be written; the previous one is intact.
        """
        if self._thread is None:
            return
        self._thread.join()
        error, then = self._error, self._then
        self._thread = self._error = self._then = None
        if error is not None:
            raise error
        if then is not None:
            then()

    def wait(self) -> None:
        """Wait for the thread, and leave its error to the next `join`."""
        if self._thread is not None:
            self._thread.join()

    def _run(
        self, path: Path, contents: Mapping[str, Any], publish: Callable[[], None] | None
    ) -> None:
        try:
            save_checkpoint(path, contents)
            if publish is not None:
                publish()
        # Any exception: `join` raises it again
        except BaseException as error:
            self._error = error


_writers: weakref.WeakSet[CheckpointWriter] = weakref.WeakSet()


def _wait_for_all() -> None:
    for writer in list(_writers):
        writer.wait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_all)


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory, which later updates do not change."""
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    # It waits for the device, so that the copy is complete
    return tensor.detach().cpu()
