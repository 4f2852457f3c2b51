"""The errors a user can cause. Each carries the exit code that the scripts return for it.

The message is one line: where (file or dotted config key), what was found, what was expected, and
the nearest valid name."""

from collections.abc import Sequence


def all_of(problems: Sequence[str]) -> str:
    """Several problems in one line; a single one as it is."""
    first, *others = problems
    return f"{first}; also: {'; also: '.join(others)}" if others else first


class ProjectError(Exception):
    """Base of every error that is reported as one line, without a traceback."""

    exit_code = 1


class ConfigError(ProjectError):
    """A config file, a config key or a command line that cannot be used."""

    exit_code = 2


class CheckpointError(ProjectError):
    """A checkpoint that cannot be read, or does not belong to this model or run."""

    exit_code = 3


class DataError(ProjectError):
    """Images or labels that are missing, broken or inconsistent."""

    exit_code = 4


class NonFiniteError(ProjectError):
    """A loss, a gradient, a weight or a result is infinite or NaN."""

    exit_code = 5


class Stopped(ProjectError):  # noqa: N818 - not an error: the run ended as it was asked to
    """Training was stopped by a signal after saving; the exit code is 128 plus the signal's
    number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
