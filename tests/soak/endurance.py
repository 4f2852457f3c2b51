"""Runs that are ended at random moments and resumed until they finish, without losing anything."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import torch

from base.checkpoint import load_checkpoint
from base.run_folder.names import BEST, LAST, METRICS, RESULT
from tests.soak.attempts import ENDINGS, Attempt, attempt, checkpoints, damage, position
from tests.soak.scenarios import tree_of

ATTEMPTS = 14
"""The number of attempts after which a run is no longer interrupted."""
DAMAGED, DISK_FULL = 0.2, 0.05
"""Probability that the last checkpoint is damaged after an attempt, and that the disk is full
during one."""
STOPPED = re.compile(
    r"stopped by SIG\w+ after (\d+) epochs? and (\d+) batch(?:es)?; continue with -r "
)
FULL = ("cannot be written", "disk is full", "shared memory")
"""Parts of the messages of a run that has no room for its files."""
TIMES = ("train_seconds", "images_per_second")


@dataclass
class Tally:
    """The events so far.

    Attributes:
        counts: number of events by kind.
        failures: descriptions of events that must not happen.
    """

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Endurance:
    """Runs of one scenario, each compared with an undisturbed run.

    Args:
        name: name of the scenario.
        folder: folder for everything that is written; it is created.
        images: folder of the image files.
        random: chooses moments and signals.
        tally: the events are added to it.
    """

    def __init__(self, name: str, folder: Path, images: Path, random: Random, tally: Tally) -> None:
        self.name, self.folder, self.random, self.tally = name, folder, random, tally
        folder.mkdir(parents=True)
        self.damaged = False
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(tree_of(name, images)))
        self.endings = ["SIGTERM", "SIGINT"] if "processes" in name else list(ENDINGS)
        begin = monotonic()
        done = self._attempt(folder / "undisturbed", None, None)
        if done.code != 0:
            raise AssertionError(f"{name}: exit {done.code}: {done.output[-2000:]}")
        self.seconds = monotonic() - begin
        self.expected = outcome(folder / "undisturbed")

    def run(self) -> None:
        """Interrupt and resume a run until it finishes; add the events to the tally."""
        run, counts = self.folder / "run", self.tally.counts
        attempts, self.damaged = 0, False
        while True:
            if position(run) is None:
                self._check_refusal(run)
            before = position(run) or (0, 0)
            ending = self.random.choice(self.endings) if attempts < ATTEMPTS else None
            limit = None
            if ending and self.random.random() < DISK_FULL and (run / LAST).exists():
                limit = self.random.randrange(1, (run / LAST).stat().st_size)
            done = self._attempt(run, ending, limit)
            attempts += 1
            counts["attempts"] += 1
            counts[done.ending or ("full disks" if limit else "left in peace")] += 1
            self._judge(run, done, before, limit)
            if self.tally.failures:
                return
            if done.code == 0:
                break
            if (run / LAST).exists() and self.random.random() < DAMAGED:
                counts[damage(run, self.random)] += 1
                self.damaged = True
        found = outcome(run)
        for what, value in self.expected.items():
            if not same(found[what], value):
                self._fail(f"{what} differs from the undisturbed run")
        if list(run.rglob("*.incomplete")):
            self._fail("incomplete files are left")
        counts["runs"] += 1
        counts["epochs"] += found["epochs"]
        counts["minibatches"] += found["minibatches"]
        shutil.rmtree(run)

    def _attempt(self, run: Path, ending: str | None, limit: int | None) -> Attempt:
        words = (
            ["-r", str(run)]
            if checkpoints(run)
            else ["-c", str(self.config), "--run_dir", str(run)]
        )
        seconds = self.random.uniform(0, 0.8 * self.seconds) if ending else 0.0
        return attempt(words, self.folder / "output.log", ending, seconds, self.random, limit)

    def _check_refusal(self, run: Path) -> None:
        """Check that a resume without a good checkpoint is refused and changes nothing."""
        if checkpoints(run):
            before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
            done = self._attempt(run, None, None)
            if done.code != 3 or len(done.output.splitlines()) != 1:
                self._fail(f"without a good checkpoint: exit {done.code}: {done.output[-500:]}")
            if any(file.read_bytes() != data for file, data in before.items()):
                self._fail("a refused resume has changed something")
            self.tally.counts["refused, as no checkpoint was good"] += 1
        elif run.exists():
            self.tally.counts["ended before the first checkpoint"] += 1
        shutil.rmtree(run, ignore_errors=True)

    def _judge(self, run: Path, done: Attempt, before: tuple[int, int], limit: int | None) -> None:
        after, logged = position(run) or (0, 0), logged_epochs(run)
        stopped = STOPPED.search(done.output)
        if stopped:
            self.tally.counts["saved at the step of the signal"] += 1
            if (int(stopped[1]), int(stopped[2])) != after:
                self._fail(f"said {stopped[0]}, but saved {after}")
        expected = {0} if done.ending is None else {0, -9, -15, 130, 143}
        if done.code not in (expected | {3, 4} if limit else expected):
            self._fail(f"{done.ending}: exit {done.code}: {done.output[-1000:]}")
        if limit and done.code in (3, 4) and not any(word in done.output for word in FULL):
            self._fail(f"full disk: {done.output[-500:]}")
        # A KeyboardInterrupt within the imports, before any work, is not an error
        if "Traceback" in done.output and "KeyboardInterrupt" not in done.output:
            place = done.output.index("Traceback")
            shown = done.output[max(0, place - 300) : place + 2000]
            self._fail(f"{done.ending}: exit {done.code}: {shown}")
        if after < before:
            self._fail(f"{done.ending}: went back from {before} to {after}")
        # A run that resumes from an older checkpoint cuts its log
        if after[0] < logged and not self.damaged:
            self._fail(f"{done.ending}: {logged} epochs are logged, {after[0]} saved")
        if "instead" in done.output:
            self.tally.counts["went on from an older checkpoint"] += 1

    def _fail(self, what: str) -> None:
        self.tally.failures.append(f"{self.name}: {what}")


def outcome(run: Path) -> dict[str, Any]:
    """Return everything about a finished run that must not depend on interruptions."""
    last, result = load_checkpoint(run / LAST), json.loads((run / RESULT).read_text())
    batch_size = last["config"]["data_loader"]["args"]["batch_size"]
    return {
        "metrics.jsonl": (run / METRICS).read_bytes(),
        "the last model": last["state_dict"],
        "the averaged model": last.get("ema_state_dict"),
        "the optimizer": last["optimizer"],
        "the best model": load_checkpoint(run / BEST)["state_dict"],
        "result.json": {key: value for key, value in result.items() if key not in TIMES},
        "epochs": last["epoch"],
        "minibatches": last["epoch"]
        * -(-last["progress"]["images_seen"] // last["epoch"] // batch_size),
    }


def logged_epochs(run: Path) -> int:
    """Return the number of complete lines of `metrics.jsonl`."""
    file = run / METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def same(first: Any, second: Any) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(same(first[key], second[key]) for key in first)
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
