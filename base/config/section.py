"""What every section of the config tree is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

LARGEST = 10**9
"""The upper bound of integers that have none of their own, except the seed: a larger one was
mistyped, and torch would stumble."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _number(value: object) -> object:
    """Refuse what is not a number but can be made one, such as a tensor, which pydantic takes for a
    float even if it is strict; and integers that are too large for a float."""
    if type(value) not in (int, float) or (type(value) is int and abs(value) > LARGEST):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""An integer or a float, also an infinite one or NaN."""
FilePath = Annotated[str, Field(min_length=1)]
"""The path of a file or folder; the current folder is a dot."""


def _has_home(text: str) -> str:
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text[:80]!r}: there is no such user here") from None
    return text


InputPath = Annotated[FilePath, AfterValidator(_has_home)]
"""The path of a file or folder to read, which may begin with a home folder."""


class Section(BaseModel):
    """One object of the tree: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """Key -> field, of every key that may stand in it."""
        return dict(cls.model_fields)


@dataclass(frozen=True)
class Needs:
    """Metadata of a type: what the key has an effect with.

    `Annotated[float, Needs("trainer.OCNN", ...)]` is the type of such a key.

    Attributes:
        what: in words, after "only with".
        met: whether a config (the whole tree) has that.
    """

    what: str
    met: Callable[[Any], bool]


def lies_in(key: str, places: Iterable[str]) -> bool:
    """Whether a dotted key, or a section that it lies in, is one of `places`."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def section_in(annotation: Any) -> type[Section] | None:
    """The section class that a field's type is, or may be; None for a leaf."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(
        (kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None
    )
