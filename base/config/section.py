"""The base class of the config's sections, and the types that they share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

LARGEST = 10**9
"""The upper bound of every integer that has no other one, except the seed. A larger number is a
typing error, and torch would fail with an overflow."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _number(value: object) -> object:
    # Even strict pydantic accepts objects that float() can convert, such as tensors
    if type(value) not in (int, float):
        raise ValueError("expected a number")
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""An integer or a float; infinite numbers and NaN are included."""
FilePath = Annotated[str, Field(min_length=1)]
"""The path of a file or folder. It is not empty: the current folder is a dot."""


def _check_home(text: str) -> str:
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text[:80]!r}: this machine has no such user") from None
    return text


InputPath = Annotated[FilePath, AfterValidator(_check_home)]
"""The path of a file or folder to read, which may begin with `~` or `~user`."""


class Section(BaseModel):
    """One object of the config tree: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """Return key -> field for every key that it may hold."""
        return dict(cls.model_fields)


@dataclass(frozen=True)
class Needs:
    """Metadata of a type: a condition without which the key has no effect.

    `Annotated[float, Needs("trainer.OCNN", ...)]` is the type of such a key.

    Attributes:
        what: the condition in words, as they follow "only with".
        met: a function that tells whether a config (the whole tree) meets it.
    """

    what: str
    met: Callable[[Any], bool]


def lies_in(key: str, places: Iterable[str]) -> bool:
    """Whether a dotted key, or a section that holds it, is one of `places`."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section class of a field's type, also of an optional one; None for a leaf."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
