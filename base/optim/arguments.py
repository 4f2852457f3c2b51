"""Checks of the arguments that a config gives to torch's optimizers and schedules.

Names and types are compared with the signature of the class. torch itself raises an error for many
values out of range; `RANGES` holds those that it accepts silently.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from base.config.arguments import adapter_of, parameters_of, takes
from base.errors import ConfigError, all_of
from base.registry import did_you_mean
from base.text import one_line

Range = tuple[str, Callable[[float], bool]]
"""What is expected, in words, and a function that tests a number."""
FROM_0: Range = ("at least 0", lambda number: number >= 0)
FROM_1: Range = ("at least 1", lambda number: number >= 1)
ABOVE_0: Range = ("above 0", lambda number: number > 0)
BELOW_1: Range = ("at least 0 and below 1", lambda number: 0 <= number < 1)
FRACTION: Range = ("at least 0 and at most 1", lambda number: 0 <= number <= 1)
RANGES: dict[str, Range] = {
    # optimizers
    **dict.fromkeys(("momentum", "rho"), BELOW_1),
    **dict.fromkeys(("dampening", "alpha"), FRACTION),
    **dict.fromkeys(("lambd", "t0"), FROM_0),
    # schedules
    **dict.fromkeys(("step_size", "T_max", "total_iters", "milestones"), FROM_1),
    **dict.fromkeys(("epochs", "steps_per_epoch"), FROM_1),
    **dict.fromkeys(("eta_min", "min_lr", "base_lr", "max_lr"), FROM_0),
    **dict.fromkeys(("gamma", "factor", "power", "patience", "cooldown", "threshold"), FROM_0),
    **dict.fromkeys(("base_momentum", "max_momentum"), BELOW_1),
    **dict.fromkeys(("step_size_up", "step_size_down"), ABOVE_0),
    **dict.fromkeys(("div_factor", "final_div_factor"), ABOVE_0),
}
"""Ranges of arguments that torch does not check, the same for every class that has an argument of
this name. For a list it is the range of its elements."""
WIDER_TYPES: dict[str, Any] = {"step_size_up": float, "step_size_down": float | None}
"""Types of arguments that torch annotates too narrowly: CyclicLR turns both into floats, and half
steps are in use."""
NOT_FROM_CONFIG = ("optimizer", "last_epoch")
"""Arguments that the project gives itself."""
TORCH_WORDS = {
    "lr": "learning rate",
    "eps": "epsilon",
    "betas": "beta",
    "etas": "eta",
    "start_factor": "starting multiplicative factor",
    "end_factor": "ending multiplicative factor",
}
"""Arguments that torch's error messages call by another name."""
# torch imports these two names for type checkers only. As `list`, pydantic also checks the elements
TYPES_IN_ANNOTATIONS = {"Callable": Callable, "Iterable": list, "Sequence": list}


def check_arguments(
    cls: type, args: Mapping[str, Any], key: str, positional: int, others: Iterable[type] = ()
) -> None:
    """Compare arguments with the signature of a class.

    Args:
        cls: the optimizer or schedule.
        args: the arguments in the config.
        key: the dotted key of `args`.
        positional: how many of the first parameters the project gives itself.
        others: classes whose arguments a config may have inherited.

    Raises:
        ConfigError: one line that names every argument that is unknown, missing, of the wrong type
            or out of its range.
    """
    parameters = parameters_of(cls)[positional:]
    parameters = [each for each in parameters if each.name not in NOT_FROM_CONFIG]
    names = [each.name for each in parameters]
    problems = []
    for name in args:
        if name not in names:
            hint = _hint_for_inherited(name, key, others) or did_you_mean(name, names)
            problem = f"{key}.{one_line(name, 80)}: {cls.__name__} takes no such argument{hint}"
            # The list is long, so it follows only the first of several problems
            problems.append(problem if problems else f"{problem} (it takes: {', '.join(names)})")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in args:
            problems.append(f"{key}.{parameter.name}: required by {cls.__name__}, but not given")
    types = _argument_types(cls)
    for name, value in args.items():
        # The schedules inside a SequentialLR are checked when they are built
        if name in names and name != "schedulers":
            problem = _problem_with_value(name, value, types.get(name, Any))
            if problem:
                problems.append(f"{key}.{name}: {problem}, not {format_json(value)}")
    if problems:
        raise ConfigError(all_of(problems))


def argument_in_message(message: str, args: Iterable[str]) -> str:
    """Return `.name` of the argument that an error message of torch is about.

    That is the first one that the message names, or the only one that was given; an empty string if
    the message names none.
    """
    names = list(args)
    places = {}
    for name in names:
        words = TORCH_WORDS.get(name, name)
        found = re.search(rf"\b{re.escape(words)}\b", message, re.IGNORECASE)
        if found:
            places[name] = found.start()
    if places:
        return f".{min(places, key=lambda name: places[name])}"
    return f".{names[0]}" if len(names) == 1 else ""


def format_json(value: Any) -> str:
    """Return a config value as JSON for a message, cut to 80 characters."""
    return one_line(json.dumps(value), 80)


def _hint_for_inherited(name: str, key: str, others: Iterable[type]) -> str:
    """Return how to drop an argument of another class, which a parent config may have given."""
    is_taken = any(takes(other, name) for other in others)
    # --set cannot change an element of a list
    in_list = any(part.isdecimal() for part in key.split("."))
    if not is_taken or in_list:
        return ""
    return f"; to leave it out: --set {key}.{name}=null"


def _problem_with_value(name: str, value: Any, annotation: Any) -> str | None:
    """Return what an argument's type or range requires; None if the value meets both."""
    if not _has_type(value, annotation):
        words = _describe_type(annotation) or "a Python object, which JSON cannot hold"
        return f"expected {words}"
    values = value if isinstance(value, list) else [value]
    numbers = [each for each in values if isinstance(each, int | float)]
    expected, is_in_range = RANGES.get(name, ("", None))
    if is_in_range is not None and not all(map(is_in_range, numbers)):
        plural = "numbers " if isinstance(value, list) else ""
        return f"expected {plural}{expected}"
    # torch takes milestones in any order, and then a later one may pass unnoticed
    if name == "milestones" and value != sorted(set(numbers)):
        return "expected ascending numbers"
    return None


def _argument_types(cls: type) -> dict[str, Any]:
    """Return argument -> annotation; empty if an annotation cannot be resolved."""
    try:
        return get_type_hints(cls.__init__, localns=TYPES_IN_ANNOTATIONS) | WIDER_TYPES
    except (NameError, TypeError, AttributeError):
        return {}


def _has_type(value: Any, annotation: Any) -> bool:
    # Annotations may name tensors, which no JSON value is
    adapter = adapter_of(annotation, any_classes=True)
    if adapter is None:
        return True
    try:
        # As JSON, so that a list is accepted for a tuple although types are strict
        adapter.validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True


def _describe_type(annotation: Any) -> str:
    """An annotation in words, without the types that JSON cannot hold."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        words = [_describe_type(part) for part in parts]
        return " or ".join(word for word in words if word)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(map(_describe_type, parts))}"
    if origin is list:
        return f"a list, each element {_describe_type(parts[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(annotation, "")
