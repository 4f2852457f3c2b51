"""One attempt at a run: a process that trains as the script does, and signals that end it early."""

import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.util import _exit_function
from pathlib import Path
from random import Random

import train_robust
from base.checkpoint.find import numbered_checkpoints
from base.checkpoint.resume import load_to_resume
from base.command_line import run_script
from base.errors import CheckpointError
from base.run_folder.names import BEST, LAST

SCRIPT = Path(train_robust.__file__).resolve()
TIMEOUT = 300.0
"""Seconds after which an attempt counts as hanging."""

ENDINGS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGKILL to the process group": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGTERM, then SIGINT": (signal.SIGTERM, signal.SIGINT),
    "SIGTERM, then SIGKILL": (signal.SIGTERM, signal.SIGKILL),
}
"""Name -> the signals that end an attempt, a moment apart."""


@dataclass(frozen=True)
class Attempt:
    """How an attempt went.

    Attributes:
        code: the exit code; minus the signal's number if a signal killed it.
        output: its output on both streams.
        ending: which of `ENDINGS` was sent; None if it ended by itself.
    """

    code: int
    output: str
    ending: str | None


def attempt(
    words: list[str],
    log: Path,
    ending: str | None,
    seconds: float,
    random: Random,
    limit: int | None,
) -> Attempt:
    """Run `train_robust.py WORDS` in a forked process, and end it after a number of seconds.

    Args:
        words: the arguments of the script.
        log: the file for its output.
        ending: one of `ENDINGS`; None lets the process run.
        seconds: time until the signals are sent.
        random: chooses the time between two signals.
        limit: maximal size of its files in bytes, which acts like a full disk; None for no limit.
    """
    # SIGINT is blocked until the new process runs the script
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    with warnings.catch_warnings():
        # Since 3.12 Python warns that forking a process with threads may deadlock
        warnings.simplefilter("ignore")
        process = os.fork()
    if process == 0:
        _become_script(words, log, limit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    begin = time.monotonic()
    sent = None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if ending and sent is None and time.monotonic() - begin > seconds:
            sent = ending
            for place, number in enumerate(ENDINGS[ending]):
                time.sleep(place * random.uniform(0, 0.05))
                (os.killpg if "group" in ending else os.kill)(process, number)
        if time.monotonic() - begin > TIMEOUT:
            os.killpg(process, signal.SIGKILL)
            raise AssertionError(f"hangs: {words}")
        time.sleep(0.002)
    return Attempt(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), sent)


def _become_script(words: list[str], log: Path, limit: int | None) -> None:
    """Run the script and exit; this forked copy of the test process must never go further."""
    code = 1
    try:
        code = _run_script(words, log, limit)
    except KeyboardInterrupt:
        # A second signal within the handler of the first one
        code = 130
    finally:
        os._exit(code)


def _run_script(words: list[str], log: Path, limit: int | None) -> int:
    """Run the script and return its exit code."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [str(SCRIPT), *words]
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        run_script(train_robust.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        # After the script's last line
        code = 130
    except BaseException:
        traceback.print_exc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ends the data loader's workers
    _exit_function()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def position(folder: Path) -> tuple[int, int] | None:
    """Return the epochs and batches done by the checkpoint that a resume would take.

    None if it would find none.
    """
    try:
        _, checkpoint, _ = load_to_resume(folder)
    except CheckpointError:
        return None
    return checkpoint["epoch"], checkpoint["batch"]


def damage(folder: Path, random: Random) -> str:
    """Damage the last checkpoint as disks and people do; return the kind of damage."""
    file = folder / LAST
    kind = random.choice(["a flipped bit", "a truncated file", "a deleted file"])
    if kind == "a deleted file":
        file.unlink()
    elif kind == "a truncated file":
        os.truncate(file, random.randrange(file.stat().st_size))
    else:
        with file.open("r+b") as opened:
            place = random.randrange(file.stat().st_size)
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << random.randrange(8)]))
    return kind


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoint files of a run folder."""
    return [
        file
        for file in (folder / LAST, folder / BEST, *numbered_checkpoints(folder).values())
        if file.exists()
    ]
