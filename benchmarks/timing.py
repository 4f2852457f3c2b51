"""Timing of two or more sides, alternately and in one process, with a median and its spread."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

FEWEST = 2
"""Rounds of a comparison that count even where they take long."""

ENOUGH_SECONDS = 20.0
"""After so many seconds of rounds that count, `FEWEST` are enough: long rounds vary by a few
percent only, as the sides take turns, and the whole table has to be ready within 20 minutes."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value; quartiles between two values are interpolated."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high), len(values))


@dataclass(frozen=True)
class Paired:
    """A value of each side in each round: seconds, bytes, points.

    The i-th values of all sides come from the same round.
    """

    values: Mapping[str, Sequence[float]]

    def spread(self, side: str) -> Spread:
        """The spread of one side's values."""
        return Spread.of(self.values[side])

    def rate(self, side: str, count: float) -> Spread:
        """The spread of `count / value`: images per second where the values are seconds."""
        return Spread.of([count / value for value in self.values[side]])

    def ratio(self, above: str, below: str) -> Spread:
        """The spread of the ratios round by round."""
        # What slows down both sides of a round cancels.
        return Spread.of(
            [a / b for a, b in zip(self.values[above], self.values[below], strict=True)]
        )

    def difference(self, first: str, second: str) -> Spread:
        """The spread of `first - second`, round by round."""
        return Spread.of(
            [a - b for a, b in zip(self.values[first], self.values[second], strict=True)]
        )

    def smallest(self, sides: Iterable[str]) -> str:
        """The side with the smallest median: the fastest."""
        return min(sides, key=lambda side: self.spread(side).median)


def compare(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = perf_counter,
    at_least: int = FEWEST,
    enough: float = ENOUGH_SECONDS,
) -> Paired:
    """Seconds that every side takes, `repeats` times, after `warmup` rounds that do not count.

    Rounds that take long end the comparison early: after `at_least` of them none begins once those
    that count have taken `enough` seconds.

    Sides take turns (a b c a b c ...), so that a machine that becomes slower or faster does so for
    all of them. On a CUDA device a time ends when the device has finished.

    Args:
        sides: name -> a function without arguments, which is timed.
        repeats: rounds that count.
        warmup: rounds before them.
        device: where the sides compute.
        clock: a function that returns seconds.
        at_least: rounds that count whatever they take.
        enough: seconds; see above.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + repeats):
        taken_so_far = sum(map(sum, seconds.values()))
        if number >= warmup + at_least and taken_so_far >= enough:
            break
        for name, side in sides.items():
            synchronize(device)
            start = clock()
            side()
            synchronize(device)
            taken = clock() - start
            if number >= warmup:
                seconds[name].append(taken)
    return Paired(seconds)


def seconds_of(
    side: Callable[[], object],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    at_least: int = FEWEST,
    enough: float = ENOUGH_SECONDS,
) -> Spread:
    """The seconds that one side takes alone; see `compare`."""
    times = compare(
        {"": side}, repeats, warmup=warmup, device=device, at_least=at_least, enough=enough
    )
    return times.spread("")


def synchronize(device: torch.device | str) -> None:
    """Wait until a CUDA device has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
