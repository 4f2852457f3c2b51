"""Checks of the numeric arguments of attacks."""

from math import isfinite
from numbers import Integral, Real
from typing import Any

LARGEST_LINF = 1.0
"""In units of the pixel range. A larger l-inf size was meant in 1/255; it would
allow every image."""


def check_size(name: str, value: Any, norm: str) -> float:
    """Return a radius or step size, in units of the pixel range, as a float.

    Raises:
        ValueError: it is not a finite number of at least 0, or under l-inf it is above 1.
    """
    size = check_number(name, value)
    if size < 0:
        raise ValueError(f"{name}: expected at least 0, not {value}")
    if norm == "linf" and size > LARGEST_LINF:
        hint = ""
        if size <= 255:
            hint = f"; {value:g}/255?"
        raise ValueError(
            f"{name}: l-inf sizes are in units of the pixel range, at most 1, not {value}{hint}"
        )
    return size


def check_number(name: str, value: Any) -> float:
    """Return a finite number as a float.

    Raises:
        ValueError: it is not a finite number, or it is True or False.
    """
    # bool is a subclass of int, but epsilon=True is a mistake
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{name}: expected a finite number, not {value!r}")
    return float(value)


def check_count(name: str, value: Any, smallest: int = 1) -> int:
    """Return an integer of at least `smallest` as an int.

    Raises:
        ValueError: it is not such an integer, or it is True or False.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name}: expected an integer of at least {smallest}, not {value!r}")
    return int(value)
