"""Checks of the numbers that attacks are made with. Each raises a ValueError that says what was
found and what was expected."""

from math import isfinite
from numbers import Integral, Real
from typing import Any

LARGEST_LINF = 1.0
"""In units of the pixel range: a larger l-inf size was meant in 1/255, and would allow every
image."""


def check_size(name: str, value: Any, norm: str) -> float:
    """A radius or a step size, in units of the pixel range: finite, at least 0, under l-inf at most
    1.

    Raises:
        ValueError: it is not.
    """
    size = check_number(name, value)
    if size < 0:
        raise ValueError(f"{name}: expected at least 0, not {value}")
    if norm == "linf" and size > LARGEST_LINF:
        hint = f"; {value:g}/255?" if size <= 255 else ""
        raise ValueError(
            f"{name}: l-inf sizes are in units of the pixel range, at most 1, not {value}{hint}"
        )
    return size


def check_number(name: str, value: Any) -> float:
    """A finite number; True and False do not count as numbers.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{name}: expected a finite number, not {value!r}")
    return float(value)


def check_count(name: str, value: Any, smallest: int = 1) -> int:
    """An integer of at least `smallest`; True and False do not count as integers.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name}: expected an integer of at least {smallest}, not {value!r}")
    return int(value)
