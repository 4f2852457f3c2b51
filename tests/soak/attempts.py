"""One attempt at a run: a process that trains, as the script would, and what ends it before its
time."""

import os
import resource
import signal
import sys
import time
import traceback
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
"""What ends an attempt -> its signals, a moment apart."""


@dataclass(frozen=True)
class Attempt:
    """How an attempt went.

    Attributes:
        code: the exit code; minus the signal's number where that ended it.
        said: its output, both streams.
        ending: which of `ENDINGS` was sent; None if it ended before.
    """

    code: int
    said: str
    ending: str | None


def attempt(
    words: list[str],
    log: Path,
    ending: str | None,
    seconds: float,
    random: Random,
    limit: int | None,
) -> Attempt:
    """Run `train_robust.py WORDS` in a process of its own, forked, and send `ending` after that
    many seconds.

    Args:
        words: of the command line.
        log: the file for its output.
        ending: of `ENDINGS`; None lets it run.
        seconds: to wait.
        random: for the moment between two signals.
        limit: bytes that a file of it may have at most, which stands for a full disk; None for no
            limit.
    """
    # until the new process is the script
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    process = os.fork()
    if process == 0:
        _become_script(words, log, limit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    begin, sent, status = time.monotonic(), None, 0
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
    """Whatever happens, this process ends here: it is a copy of another one, and has no business
    beyond this."""
    code = 1
    try:
        code = _run_script(words, log, limit)
    except KeyboardInterrupt:  # within a handler of the first one
        code = 130
    finally:
        os._exit(code)


def _run_script(words: list[str], log: Path, limit: int | None) -> int:
    """The exit code of the script."""
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
    except KeyboardInterrupt:  # after the script's last line
        code = 130
    except BaseException:
        traceback.print_exc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _exit_function()  # ends the loader's workers
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def position(folder: Path) -> tuple[int, int] | None:
    """Epochs and batches done by the checkpoint that a resume would take; None where there is no
    good one."""
    try:
        _, checkpoint, _ = load_to_resume(folder)
    except CheckpointError:
        return None
    return checkpoint["epoch"], checkpoint["batch"]


def damage(folder: Path, random: Random) -> str:
    """Do to the last checkpoint what disks and people do; returns what."""
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
    """All checkpoint files of a run folder."""
    return [
        file
        for file in (folder / LAST, folder / BEST, *numbered_checkpoints(folder).values())
        if file.exists()
    ]
