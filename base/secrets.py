"""Comet's API key on a command line, and texts without it."""

import re
from collections.abc import Sequence

KEY_WORD = re.compile(r"(--key|--comet_key|(--set=)?comet(\.api)?)(\W(?P<key>.*))?", re.DOTALL)
"""A word of a command line that holds the key, or is followed by it. Every value in the section
`comet` is treated as the key."""

SHORTEST_KEY = 4
"""Characters. Shorter values are not keys, and would be found in any text."""


def command_without_key(command: Sequence[str]) -> list[str]:
    """Return a command line with the key replaced by `***`, in whichever form it was given."""
    cleaned = []
    key_follows = False
    for word in command:
        if key_follows:
            cleaned.append("***")
            key_follows = False
            continue
        match = KEY_WORD.fullmatch(word)
        if match is None:
            cleaned.append(word)
        elif match["key"] is None:
            cleaned.append(word)
            key_follows = True
        else:
            cleaned.append(f"{word[: match.start('key')]}***")
    return cleaned


def without_keys(message: str, command: Sequence[str]) -> str:
    """Return a message with the keys of a command line replaced by `***`.

    The command line may be malformed: a parser's message may quote any part of it.
    """
    for word, following in zip(command, [*command[1:], ""], strict=True):
        match = KEY_WORD.fullmatch(word)
        if match is None:
            continue
        key = match["key"] or following
        if len(key) >= SHORTEST_KEY:
            message = message.replace(key, "***")
    return message
