"""Name -> constructor tables, and the one way to look a name up.

A registry is a plain dict. The layer tables stand here, empty, because `BaseModel` resolves names with them and must not
import `models`; `models.layers` fills them.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from base.errors import ConfigError

Constructor = Callable[..., Any]
T = TypeVar("T")

CONV_LAYERS: dict[str, Constructor] = {}
"""Every entry has the signature of `torch.nn.Conv2d`."""

NORM_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(channels, affine=True, norm_groups=32)`."""

LINEAR_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(in_features, out_features, bias=True)`."""

ACTIVATION_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(channels, inplace=True)`."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string where none is near."""
    names = list(known)
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    nearest = get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.6)
    return f"; did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry called `name`; `key` is the dotted config key that an error names.

    Raises:
        ConfigError: the name is not in the table; the message lists the names that are.
    """
    try:
        return table[name]
    except (KeyError, TypeError):
        known = ", ".join(table)
        raise ConfigError(f"{key}: {name!r} is not one of: {known}{did_you_mean(str(name), table)}") from None
