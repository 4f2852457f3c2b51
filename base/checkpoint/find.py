"""Find checkpoints by their names, in a run folder or below a folder of runs."""

import re
from pathlib import Path

from base.errors import CheckpointError
from base.run_folder.names import BEST, LAST, NUMBERED
from base.text import first_line, one_line

LEVELS_TO_RUNS = 3
"""How deep below a folder its runs are searched: `<save_dir>/<name>/<run id>` is two levels."""


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint in `folder`, even if it is damaged by now."""
    if (folder / LAST).exists() or (folder / BEST).exists():
        return True
    return bool(numbered_checkpoints(folder))


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return epoch -> file of a run folder's numbered checkpoints."""
    pattern = re.compile(NUMBERED.format(r"(\d+)").replace(".", r"\."))
    found = {}
    for path in folder.glob("*"):
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return found


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file that `path` stands for.

    Args:
        path: the file itself; a run folder, for its best model or, before there is one, its last
            checkpoint; or a folder above a single run, for that run.

    Raises:
        CheckpointError: `path` holds no checkpoint, or `path` is a folder above several runs.
    """
    path = find_run(path)
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: holds neither {BEST} nor {LAST}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    return path


def find_run(path: str | Path) -> Path:
    """Return the run folder that `path` stands for.

    Returns:
        The only run below a folder that is not a run folder itself; otherwise `path`, also if it is
        a file or if there are no runs below it.

    Raises:
        CheckpointError: it cannot be read, or several runs lie below it.
    """
    path = Path(path)
    try:
        if not path.is_dir() or has_checkpoint(path):
            return path
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None
    runs = _runs_below(path)
    if not runs:
        return path
    if len(runs) > 1:
        newest = ", ".join(one_line(run) for run in runs[-5:])
        raise CheckpointError(
            f"{path}: holds {len(runs)} runs: name one, such as (newest last) {newest}"
        )
    return runs[0]


def _runs_below(folder: Path) -> list[Path]:
    """Return the folders with checkpoints below `folder`, by the time of their last checkpoint."""
    ages: dict[Path, tuple[float, Path]] = {}
    for run in _folders_with_checkpoints(folder, LEVELS_TO_RUNS):
        times = [file.stat().st_mtime for file in run.glob("*.pth") if file.exists()]
        # Resolved, so that a run and a link to it count as one
        ages.setdefault(run.resolve(), (max(times, default=0.0), run))
    return [run for _, run in sorted(ages.values())]


def _folders_with_checkpoints(folder: Path, levels: int) -> list[Path]:
    try:
        if has_checkpoint(folder):
            return [folder]
        if levels == 0:
            return []
        children = [child for child in folder.iterdir() if child.is_dir()]
    except OSError:
        # A run below a folder that cannot be listed could not be read either
        return []
    # Links come last, so that a run which lies here gets its own name and not a link's
    children.sort(key=lambda child: (child.is_symlink(), child.name))
    return [run for child in children for run in _folders_with_checkpoints(child, levels - 1)]
