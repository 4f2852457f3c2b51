"""What a command sets before its other imports, which take seconds; commands import it first."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import base.openmp  # noqa: F401 - before torch is imported
from base.rooms import ROOT


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end this process with one line and exit code 130, until `run_script` begins.

    An exception would come out of the import of some library, with its traceback.
    """
    # A program that imports a command's functions keeps its own Ctrl-C.
    started = getattr(sys.modules["__main__"], "__file__", None)
    if started is None or Path(started).resolve().parent != ROOT:
        return
    # A shell script starts commands in the background with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


end_on_ctrl_c()
