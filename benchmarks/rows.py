"""What a comparison gives: rows with a goal, and tables of growth."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.timing import Paired, Spread

MIB = 2**20
COST, SPEED = "x the cost", "x as fast"


@dataclass(frozen=True)
class Settings:
    """How a comparison is to be made.

    Attributes:
        device: where the networks are.
        threads: of torch in this process; other processes that are started share as many.
        smoke: tiny networks, batches and images, one repeat: shows that everything runs, and
            nothing else.
        checkpoint: a run whose robust network is attacked, too; None for none.
        images: how many of its test images.
    """

    device: torch.device
    threads: int
    smoke: bool = False
    checkpoint: str | None = None
    images: int = 64

    @property
    def repeats(self) -> int:
        """Rounds of a comparison."""
        return 1 if self.smoke else 5

    @property
    def warmup(self) -> int:
        """Rounds before them that do not count."""
        return 0 if self.smoke else 1

    def size(self, full: int, smoke: int) -> int:
        """A number of images, steps and so on."""
        return smoke if self.smoke else full

    @property
    def network(self) -> str:
        """The network of all comparisons that do not name another."""
        return "simpleCNN" if self.smoke else "resnet18"


@dataclass(frozen=True)
class Goal:
    """A number to reach from below (`at_least`) or to stay under."""

    value: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """One comparison of two sides, or of one side with a limit.

    Attributes:
        setting: what is measured, in a few words.
        result: what the goal is about, in units of `measure`: a ratio round by round, a difference,
            or the value itself.
        measure: `COST`, `SPEED`, or a unit.
        ours: our side's name.
        other: the other's; None where there is none.
        unit: of both sides' values.
        ours_value: median and spread of our side.
        other_value: of the other.
        goal: for `result.median`; None where the row is for information.
        note: what a reader has to know.
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
        return (
            None if self.goal is None or self.result is None else self.goal.met(self.result.median)
        )

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Table:
    """How something grows: text in columns, the first of which names the line."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""

    def plain(self) -> dict[str, Any]:
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
) -> Row:
    """How many times the other side's cost ours is; `unit` `MiB` takes bytes."""
    scale = MIB if unit == "MiB" else 1
    pairs = Paired(
        {name: [value / scale for value in values] for name, values in pairs.values.items()}
    )
    goal = None if at_most is None else Goal(at_most, at_least=False)
    values = {"ours_value": pairs.spread(ours), "other_value": pairs.spread(other)}
    return Row(
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
) -> Row:
    """How many times as fast as the other side ours is; sides' values are images/s where `images`
    in a round are given."""
    unit, values = "s", {"ours_value": times.spread(ours), "other_value": times.spread(other)}
    if images is not None:
        unit, values = (
            "images/s",
            {"ours_value": times.rate(ours, images), "other_value": times.rate(other, images)},
        )
    goal = None if at_least is None else Goal(at_least, at_least=True)
    return Row(
        setting, ours, times.ratio(other, ours), SPEED, other, unit, **values, goal=goal, note=note
    )
