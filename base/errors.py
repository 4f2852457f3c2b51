"""The errors that a user can cause, each with the exit code that commands return for it.

A message is one line that names the place (file, dotted config key or flag), the value, what was
expected and the nearest valid name. `run_script` prints `error: ` before it.
"""

from collections.abc import Sequence


def all_of(problems: Sequence[str]) -> str:
    """Return one or more problems as one line."""
    return "; also: ".join(problems)


class ProjectError(Exception):
    """The base of all errors that are reported as one line, without a traceback."""

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


# The name does not end in "Error", because the run ended as it was asked to.
class Stopped(ProjectError):  # noqa: N818
    """A signal stopped the training after it had saved.

    The exit code is 128 plus the number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
