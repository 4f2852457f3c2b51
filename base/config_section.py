"""What every section of the config tree is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 10**9
"""Of all integers that have no bound of their own, but for the seed: what is larger was mistyped, and torch would stumble."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _no_zero_byte(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{text[:80]!r} holds a zero byte, which no path can")
    return text


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_no_zero_byte)]
"""The path of a file or folder; the current folder is a dot."""


class Section(BaseModel):
    """One object of the tree: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
