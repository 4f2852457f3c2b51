"""Arguments of torch's optimizers and schedules, held against their signatures: names, types,
ranges.

torch itself refuses some wrong values in its own words, takes others in silence (a negative
`gamma`, an `eta_min` below 0, a `step_size` of -1, numbers for truth values), and stumbles over the
rest while it trains."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from base.errors import ConfigError, all_of
from base.registry import did_you_mean
from base.text import one_line

Range = tuple[str, Callable[[float], bool]]
"""What is expected, in words, and whether a number is that."""
FROM_0: Range = ("at least 0", lambda number: number >= 0)
FROM_1: Range = ("at least 1", lambda number: number >= 1)
ABOVE_0: Range = ("above 0", lambda number: number > 0)
BELOW_1: Range = ("at least 0 and below 1", lambda number: 0 <= number < 1)
FRACTION: Range = ("at least 0 and at most 1", lambda number: 0 <= number <= 1)
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "lr",
            "weight_decay",
            "lr_decay",
            "initial_accumulator_value",
            "momentum_decay",
            "lambd",
            "t0",
        ),
        FROM_0,
    ),
    **dict.fromkeys(("eta_min", "min_lr", "base_lr", "max_lr", "gamma", "factor", "power"), FROM_0),
    **dict.fromkeys(("patience", "cooldown", "threshold", "start_factor", "end_factor"), FROM_0),
    **dict.fromkeys(("step_size", "T_max", "T_0", "T_mult", "total_iters", "milestones"), FROM_1),
    **dict.fromkeys(("total_steps", "epochs", "steps_per_epoch"), FROM_1),
    **dict.fromkeys(("div_factor", "final_div_factor", "step_size_up", "step_size_down"), ABOVE_0),
    **dict.fromkeys(("momentum", "base_momentum", "max_momentum", "betas", "rho"), BELOW_1),
    **dict.fromkeys(("dampening", "alpha", "pct_start"), FRACTION),
}
"""Ranges of arguments, the same for every class that has one of that name; for lists, of their
elements."""
WIDER_KINDS: dict[str, Any] = {"step_size_up": float, "step_size_down": float | None}
"""Types of arguments that torch annotates too narrowly: CyclicLR turns both into floats, and half
steps are in use."""
NOT_THE_CONFIGS = ("optimizer", "last_epoch")
NAMES_IN_HINTS = {"Callable": Callable, "Iterable": Iterable, "Sequence": Sequence}
"""Names that torch's annotations use, but its modules import for type checkers only."""


def check_arguments(
    cls: type, args: Mapping[str, Any], key: str, given: int, others: Iterable[type] = ()
) -> None:
    """Compare `args` with the signature of `cls`, whose first `given` parameters are not the
    config's.

    Args:
        cls: whose arguments they are.
        args: the config's.
        key: where they stand in the config.
        given: see above.
        others: classes that a config may have inherited arguments from.

    Raises:
        ConfigError: naming `key` and every argument that is unknown, missing, of another type, or
            out of its range.
    """
    parameters = list(inspect.signature(cls).parameters.values())[given:]
    names = [parameter.name for parameter in parameters if parameter.name not in NOT_THE_CONFIGS]
    problems = []
    for name in args:
        if name not in names:
            hint = _hint_for_inherited(name, key, others) or did_you_mean(name, names)
            takes = "" if problems else f" (it takes: {', '.join(names)})"
            problems.append(
                f"{key}.{one_line(name, 80)}: {cls.__name__} takes no such argument{hint}{takes}"
            )
    for parameter in parameters:
        if (
            parameter.name in names
            and parameter.default is parameter.empty
            and parameter.name not in args
        ):
            problems.append(f"{key}.{parameter.name}: required by {cls.__name__}, but not given")
    kinds = _kinds(cls)
    for name, value in args.items():
        if name in names and name != "schedulers":  # whose parts are checked one by one
            problem = _problem(f"{key}.{name}", value, kinds.get(name, Any), RANGES.get(name))
            problems += [problem] if problem else []
    if problems:
        raise ConfigError(all_of(problems))


def _hint_for_inherited(name: str, key: str, others: Iterable[type]) -> str:
    """How to leave an argument out that another class takes: a parent config had that one."""
    taken = any(name in inspect.signature(other).parameters for other in others)
    # --set reaches no elements of a list
    in_list = any(part.isdecimal() for part in key.split("."))
    return f"; to leave it out: --set {key}.{name}=null" if taken and not in_list else ""


def shown(value: Any) -> str:
    """A value in a message."""
    return one_line(json.dumps(value), 80)


def _problem(key: str, value: Any, kind: Any, limits: Range | None) -> str | None:
    """What is wrong with the type or the range of a value; None where nothing is."""
    if not _fits(value, kind):
        return f"{key}: expected {_in_words(kind)}, not {shown(value)}"
    numbers = [
        number for number in (value if isinstance(value, list) else [value]) if _fits(number, float)
    ]
    if limits and not all(map(limits[1], numbers)):
        return f"{key}: expected {'numbers ' if isinstance(value, list) else ''}{limits[0]}, not {shown(value)}"
    if key.endswith(".milestones") and value != sorted(set(numbers)):
        return f"{key}: expected ascending numbers, not {shown(value)}"
    return None


def _kinds(cls: type) -> dict[str, Any]:
    """Argument -> its annotation; nothing where a version of torch has annotations that cannot be
    resolved."""
    try:
        return get_type_hints(cls.__init__, localns=NAMES_IN_HINTS) | WIDER_KINDS
    except NameError:
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of an annotated type. No JSON value is a tensor or a function."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
        )
    if origin in (list, Iterable, Sequence):
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or (kind in (bool, str, NoneType) and isinstance(value, kind))


def _in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        words = [
            _in_words(part) for part in parts if part in (bool, int, float, str) or get_origin(part)
        ]
        return " or ".join(word for word in words if word)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(map(_in_words, parts))}"
    if origin in (list, Iterable, Sequence):
        return f"a list, each element {_in_words(parts[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(kind, "")
