"""`RunFolder`: reads the files of a run folder. Reports and studies use it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base.config import Config, validate
from base.config.files import read_tree
from base.errors import ConfigError
from base.run_folder.names import CONFIG, ENVIRONMENT, EVALUATIONS, LABELS, METRICS, RESULT
from base.text import first_line


class RunFolder:
    """The files of one run folder. Every method reads its file again, as the run may still write.

    A damaged file raises a `ConfigError` of one line that names it, except for `environment`.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self, *, check_names: bool = True) -> Config:
        """Return the resolved config, with the defaults of keys that are newer than the run.

        Args:
            check_names: also check the names of layers, losses and other table entries. A reader
                that has not imported the user's own code does not know all of them.
        """
        file = self.path / CONFIG
        return validate(read_tree(file), str(file), check_names=check_names)

    def has_metrics(self) -> bool:
        """Return whether the run has logged anything."""
        file = self.path / METRICS
        return file.is_file() and file.stat().st_size > 0

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged values of each finished epoch; an empty list before the first."""
        file = self.path / METRICS
        if not file.exists():
            return []
        *lines, rest = _read_text(file).split("\n")
        # Without its closing brace the last line is still being written
        if rest.endswith("}"):
            lines.append(rest)
        epochs = []
        for number, line in enumerate(lines, start=1):
            values = _parse(line)
            if not isinstance(values, dict) or not isinstance(values.get("epoch"), int):
                raise ConfigError(
                    f"{file}: line {number}: {line[:60]!r} is not a JSON object with an epoch"
                )
            epochs.append(values)
        return epochs

    def result(self) -> dict[str, Any] | None:
        """Return what `result.json` holds; None while the run is not finished."""
        file = self.path / RESULT
        if not file.exists():
            return None
        return _read_object(file)

    def environment(self) -> dict[str, Any]:
        """Return what `environment.json` holds; an empty dictionary if it is missing or damaged."""
        try:
            return _read_object(self.path / ENVIRONMENT)
        except ConfigError:
            return {}

    def evaluations(self) -> dict[Path, dict[str, Any]]:
        """Return file -> contents of every report in `eval/`."""
        files = sorted((self.path / EVALUATIONS).glob("*.json"))
        return {file: _read_object(file) for file in files}

    def has_labels(self) -> bool:
        """Return whether the run has stored its labels; the oldest runs did not."""
        return (self.path / LABELS).exists()

    def labels(self, names: Sequence[str]) -> list[np.ndarray]:
        """Return these arrays of `labels.npz`, such as `train_label`."""
        file = self.path / LABELS
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                return [arrays[name] for name in names]
        except Exception as error:
            # NumPy's and zip's readers raise almost any exception for a damaged file
            raise ConfigError(f"{file}: cannot be read: {first_line(error)}") from None


def _read_object(file: Path) -> dict[str, Any]:
    # Not the strict reader of configs: the first versions wrote NaN
    value = _parse(_read_text(file))
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: is not a JSON object")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {first_line(error)}") from None


def _parse(text: str) -> Any:
    """Return the value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
