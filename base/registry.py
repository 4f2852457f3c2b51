"""Name -> constructor tables, and the one way to look a name up.

A registry is a plain dict. The layer tables stand here, empty, because `BaseModel` resolves names with them and must not
import `models`; `models.layers` fills them.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any, TypeVar

from base.errors import ConfigError

Constructor = Callable[..., Any]
T = TypeVar("T")
LEAST_ALIKE = 0.6
"""Twice the letters that two names share, by the letters that they have."""
LONGEST_COMPARED = 80
"""Letters of a name that are compared with known ones."""

CONV_LAYERS: dict[str, Constructor] = {}
"""Every entry has the signature of `torch.nn.Conv2d`."""

NORM_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(channels, affine=True, norm_groups=32)`."""

LINEAR_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(in_features, out_features, bias=True)`."""

ACTIVATION_LAYERS: dict[str, Constructor] = {}
"""Every entry is called as `(channels, inplace=True)`."""

ATTACKS: dict[str, Constructor] = {}
"""Every entry is a subclass of `attacks.Attack`, called with the arguments that it takes."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string where none is near."""
    nearest = nearest_name(str(name), known)
    return f"; did you mean {nearest!r}?" if nearest is not None else ""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was meant to be; None where that is a guess.

    That is one that is a slip of the fingers away: as many letters missing, added, swapped or wrong as its length allows, while
    case and underscores do not count. Otherwise it is the only one that has all its words, or of which it has all words, such
    as `epochs` for `num_epochs`.
    """
    names = list(known)
    plain = _plain(name)
    most_edits = max(1, len(plain) // 4)
    slips = {}
    for candidate in names:
        other = _plain(candidate)
        # each letter that one of them is longer takes an edit
        if abs(len(plain) - len(other)) > most_edits or _edits(plain, other) > most_edits:
            continue
        alike = SequenceMatcher(None, plain, other).ratio()
        # most letters of a short name must be the same: gm is not a slip for gn
        if alike >= LEAST_ALIKE:
            slips[candidate] = (_edits(plain, other), -alike)
    if slips:
        return min(slips, key=lambda candidate: slips[candidate])
    words = set(name.casefold().split("_"))
    related = [candidate for candidate in names if _contain(words, set(candidate.casefold().split("_")))]
    return related[0] if len(related) == 1 else None


def _plain(name: str) -> str:
    return name.casefold().replace("_", "")[:LONGEST_COMPARED]


def _contain(words: set[str], others: set[str]) -> bool:
    return words <= others or others <= words


def _edits(first: str, second: str) -> int:
    """How many letters must be added, dropped, replaced or swapped with their neighbour to make one text of the other (the
    optimal string alignment distance)."""
    before, above = [], list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            edits = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        before, above = above, row
    return above[-1]


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
