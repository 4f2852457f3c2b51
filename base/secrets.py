"""Comet's key on a command line, and texts without it."""

import re
from collections.abc import Sequence

GIVEN = re.compile(r"(--key|--comet_key|(--set=)?comet(\.api)?)(\W(?P<key>.*))?", re.DOTALL)
"""A word of a command line that holds the key, or is followed by it. Everything in the section
`comet` counts."""
SHORTEST = 4
"""Characters; shorter ones are no keys, and would be found in any text."""


def command_without_key(command: Sequence[str]) -> list[str]:
    """A command line with the key replaced by `***`, however it was given."""
    cleaned, follows = [], False
    for word in command:
        given = None if follows else GIVEN.fullmatch(word)
        if follows:
            cleaned.append("***")
        elif given and given["key"] is not None:
            cleaned.append(f"{word[: given.start('key')]}***")
        else:
            cleaned.append(word)
        follows = given is not None and given["key"] is None
    return cleaned


def without_keys(message: str, command: Sequence[str]) -> str:
    """A message with the keys of the command line replaced by `***`, also of one that is not
    well-formed."""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        given = GIVEN.fullmatch(word)
        key = (given["key"] or after) if given else ""
        if len(key) >= SHORTEST:
            message = message.replace(key, "***")
    return message
