"""Runs that are ended at random moments and resumed until they finish, and whether anything of them
was lost."""

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
from base.run_folder.names import LAST
from tests.soak.attempts import ENDINGS, Attempt, attempt, checkpoints, damage, position
from tests.soak.scenarios import tree_of

ATTEMPTS = 14
"""After so many, a run is left alone until it finishes."""
DAMAGED, DISK_FULL = 0.2, 0.05
"""How often the last checkpoint is damaged after an attempt, and how often the disk is full during
one."""
STOPPED = re.compile(r"stopped by SIG\w+ after (\d+) epochs and (\d+) batches; continue with -r ")
FULL = ("cannot be written", "disk is full", "shared memory")
"""What a run says when there is no room for its files."""
TIMES = ("train_seconds", "images_per_second")


@dataclass
class Tally:
    """What happened.

    Attributes:
        counts: of every kind of event, by name.
        failures: what must not happen, in words.
    """

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Endurance:
    """Runs of one scenario, each compared with one that was left in peace.

    Args:
        name: of the scenario.
        folder: for everything that is written; made here.
        random: chooses moments and means.
        tally: is added to.
    """

    def __init__(self, name: str, folder: Path, images: Path, random: Random, tally: Tally) -> None:
        self.name, self.folder, self.random, self.tally = name, folder, random, tally
        folder.mkdir(parents=True)
        self.damaged = False
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(tree_of(name, images)))
        self.endings = ["SIGTERM", "SIGINT"] if "processes" in name else list(ENDINGS)
        begin = monotonic()
        done = self._attempt(folder / "peace", None, None)
        if done.code != 0:
            raise AssertionError(f"{name}: exit {done.code}: {done.said[-2000:]}")
        self.seconds = monotonic() - begin
        self.expected = outcome(folder / "peace")

    def run(self) -> None:
        """One run through thick and thin; what went wrong is noted in the tally."""
        run, counts = self.folder / "run", self.tally.counts
        attempts, self.damaged = 0, False
        while True:
            if position(run) is None:
                self._begin_anew(run)
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
                self._fail(run, f"{what} differs from the run that was left in peace")
        if list(run.rglob("*.incomplete")):
            self._fail(run, "files are left incomplete")
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

    def _begin_anew(self, run: Path) -> None:
        """No good checkpoint is there: a resume has to say so and to leave everything as it is."""
        if checkpoints(run):
            before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
            done = self._attempt(run, None, None)
            if done.code != 3 or len(done.said.splitlines()) != 1:
                self._fail(run, f"without a good checkpoint: exit {done.code}: {done.said[-500:]}")
            if any(file.read_bytes() != data for file, data in before.items()):
                self._fail(run, "a refused resume has changed something")
            self.tally.counts["refused, as no checkpoint was good"] += 1
        elif run.exists():
            self.tally.counts["ended before the first checkpoint"] += 1
        shutil.rmtree(run, ignore_errors=True)

    def _judge(self, run: Path, done: Attempt, before: tuple[int, int], limit: int | None) -> None:
        after, logged = position(run) or (0, 0), logged_epochs(run)
        told = STOPPED.search(done.said)
        if told:
            self.tally.counts["saved at the step of the signal"] += 1
            if (int(told[1]), int(told[2])) != after:
                self._fail(run, f"said {told[0]}, but saved {after}")
        expected = {0} if done.ending is None else {0, -9, -15, 130, 143}
        if done.code not in (expected | {3, 4} if limit else expected):
            self._fail(run, f"{done.ending}: exit {done.code}: {done.said[-1000:]}")
        if limit and done.code in (3, 4) and not any(word in done.said for word in FULL):
            self._fail(run, f"full disk: {done.said[-500:]}")
        # which comes before any work, within imports
        if "Traceback" in done.said and "KeyboardInterrupt" not in done.said:
            place = done.said.index("Traceback")
            self._fail(
                run,
                f"{done.ending}: exit {done.code}: {done.said[max(0, place - 300) : place + 2000]}",
            )
        if after < before:
            self._fail(run, f"{done.ending}: went back from {before} to {after}")
        # a run that went back cuts its log when it goes on
        if after[0] < logged and not self.damaged:
            self._fail(run, f"{done.ending}: {logged} epochs are logged, {after[0]} saved")
        if "instead" in done.said:
            self.tally.counts["went on from an older checkpoint"] += 1

    def _fail(self, run: Path, what: str) -> None:
        self.tally.failures.append(f"{self.name}: {what}")


def outcome(run: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was ended."""
    last, result = load_checkpoint(run / LAST), json.loads((run / "result.json").read_text())
    batch_size = last["config"]["data_loader"]["args"]["batch_size"]
    return {
        "metrics.jsonl": (run / "metrics.jsonl").read_bytes(),
        "the last model": last["state_dict"],
        "the averaged model": last.get("ema_state_dict"),
        "the optimizer": last["optimizer"],
        "the best model": load_checkpoint(run / "model_best.pth")["state_dict"],
        "result.json": {key: value for key, value in result.items() if key not in TIMES},
        "epochs": last["epoch"],
        "minibatches": last["epoch"]
        * -(-last["progress"]["images_seen"] // last["epoch"] // batch_size),
    }


def logged_epochs(run: Path) -> int:
    """Complete lines of `metrics.jsonl`."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def same(first: Any, second: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
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
