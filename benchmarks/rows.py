"""What a comparison returns: rows with a goal, and tables."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.timing import Paired, Spread

MIB = 2**20
COST, SPEED = "x the cost", "x as fast"


@dataclass(frozen=True)
class Settings:
    """How the comparisons are made.

    Attributes:
        device: where the networks are.
        threads: CPU threads of torch, in this process and in the processes that are started.
        smoke: use tiny networks, batches and images, and one repeat, to show that everything runs.
        checkpoint: run or checkpoint of another robust network to attack; None for none.
        images: how many of its test images are attacked.
    """

    device: torch.device
    threads: int
    smoke: bool = False
    checkpoint: str | None = None
    images: int = 64

    @property
    def repeats(self) -> int:
        """Rounds of a comparison that count."""
        return 1 if self.smoke else 5

    @property
    def warmup(self) -> int:
        """Rounds before them that do not count."""
        return 0 if self.smoke else 1

    def size(self, full: int, smoke: int) -> int:
        """A number of images, steps and so on: `full`, or `smoke` under --smoke."""
        return smoke if self.smoke else full

    @property
    def network(self) -> str:
        """The network of all comparisons that do not choose their own."""
        return "simpleCNN" if self.smoke else "resnet18"


@dataclass(frozen=True)
class Goal:
    """The least value that meets it (`at_least`), or the largest."""

    value: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class BenchmarkRow:
    """One comparison of two sides, or of one side with a limit.

    Attributes:
        setting: what is measured, in a few words.
        ours: the name of our side.
        result: the number with the goal, in units of `measure`: a ratio round by round, a
            difference, or the value itself.
        measure: `COST`, `SPEED`, or a unit.
        other: the name of the other side; None where there is none.
        unit: the unit of both sides' values.
        ours_value: median and spread of our side.
        other_value: median and spread of the other side.
        goal: a goal for `result.median`; None where the row is for information.
        note: an explanation below the table.
        skipped: why nothing was measured; then there are no values.
    """

    setting: str
    ours: str
    result: Spread | None = None
    measure: str = ""
    other: str | None = None
    unit: str = "s"
    ours_value: Spread | None = None
    other_value: Spread | None = None
    goal: Goal | None = None
    note: str = ""
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or no measurement."""
        if self.goal is None or self.result is None:
            return None
        return self.goal.met(self.result.median)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class BenchmarkTable:
    """Text in columns; the first column names the line."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def cost_row(
    setting: str,
    pairs: Paired,
    ours: str,
    other: str,
    at_most: float | None,
    *,
    unit: str = "s",
    note: str = "",
) -> BenchmarkRow:
    """The cost of our side over that of the other side; with the unit "MiB", `pairs` are bytes."""
    if unit == "MiB":
        pairs = Paired(
            {name: [value / MIB for value in values] for name, values in pairs.values.items()}
        )
    goal = None if at_most is None else Goal(at_most, at_least=False)
    values = {"ours_value": pairs.spread(ours), "other_value": pairs.spread(other)}
    return BenchmarkRow(
        setting, ours, pairs.ratio(ours, other), COST, other, unit, **values, goal=goal, note=note
    )


def speed_row(
    setting: str,
    times: Paired,
    ours: str,
    other: str,
    at_least: float | None,
    *,
    images: int | None = None,
    note: str = "",
) -> BenchmarkRow:
    """How many times as fast as the other side ours is.

    The sides' values are seconds; images per second where `images`, their number in a round, is
    given.
    """
    if images is None:
        unit = "s"
        values = {"ours_value": times.spread(ours), "other_value": times.spread(other)}
    else:
        unit = "images/s"
        values = {"ours_value": times.rate(ours, images), "other_value": times.rate(other, images)}
    goal = None if at_least is None else Goal(at_least, at_least=True)
    return BenchmarkRow(
        setting, ours, times.ratio(other, ours), SPEED, other, unit, **values, goal=goal, note=note
    )
