"""The function behind `plot_training_logs.py`: run folders -> groups -> a figure, a table."""

import argparse
from collections.abc import Sequence

from base.errors import ConfigError
from base.output import PICTURES, check_outputs, save_figure
from base.text import counted, say
from reports import tables
from reports.attack_columns import attack_columns
from reports.curves import against_figure, curves_figure
from reports.groups import Group, finished_groups, group_runs
from reports.runs import LAST_EPOCH, check_known, find_runs

NEEDED = {
    "out": ("metric",),
    "table": ("result", "last_epoch", "eval", "baseline"),
    "baseline": ("paired",),
}
"""Argument -> the arguments that have no effect without it."""


def write_reports(arguments: argparse.Namespace) -> None:
    """Write the figure and the table that the parsed command line asks for.

    Raises:
        ConfigError: one line that names the flag, the run folder or the file.
    """
    _check(arguments)
    runs = find_runs(arguments.paths)
    # Before the work, so that a path that cannot be written costs no time
    check_outputs(
        {"--out": arguments.out, "--table": arguments.table},
        {"--out": PICTURES, "--table": tables.FORMATS},
        folders=[place for run in runs for place in (run.folder, run.folder.parent)],
    )
    key = arguments.against
    keys = [name for name in arguments.group_by if name != key]
    if key:
        # The last key is the one whose values are the points of a line
        keys.append(key)
    elif not keys and all(run.labels for run in runs):
        keys = ["variant"]
    groups = group_runs(runs, keys)
    finished = []
    if arguments.table or key:
        finished = finished_groups(groups)
    # The figure is drawn first, as it may raise an error, but saved after the table: nothing is
    # written if one of the two cannot be made.
    if arguments.out and key:
        shown = finished
        figure = against_figure(finished, key, arguments.metric)
    elif arguments.out:
        shown = groups
        figure = curves_figure(groups, arguments.metric)
    if arguments.table:
        table = tables.compare(
            finished,
            _columns(arguments, finished),
            arguments.baseline,
            by_last_key=bool(key) and len(keys) > 1,
            paired=arguments.paired,
        )
        tables.write_table(arguments.table, table)
    if arguments.out:
        save_figure(figure, arguments.out)
        _say_written(arguments.out, shown)
    if arguments.table:
        _say_written(arguments.table, finished)


def _check(arguments: argparse.Namespace) -> None:
    """Check that the command line asks for something, and that every flag has an effect."""
    if not (arguments.out or arguments.table):
        raise ConfigError(
            "nothing to write: name a picture with --out FILE or a table with --table FILE"
        )
    given = {name for name, value in vars(arguments).items() if value}
    for needed, names in NEEDED.items():
        useless = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if useless and needed not in given:
            value = {"baseline": "ROW"}.get(needed, "FILE")
            raise ConfigError(f"{' and '.join(useless)}: no effect without --{needed} {value}")


def _columns(arguments: argparse.Namespace, finished: Sequence[Group]) -> list[str] | None:
    """Return the columns that the command line asks for; None for the default ones."""
    logged = [name for group in finished for run in group.runs for name in run.log[-1]]
    last_epoch = arguments.last_epoch or []
    check_known("--last-epoch", last_epoch, logged, "no run logs it in its last epoch")
    columns = [
        *(arguments.result or []),
        *(f"{LAST_EPOCH}{name}" for name in last_epoch),
        *attack_columns(finished, arguments.eval or []),
    ]
    return columns or None


def _say_written(path: str, groups: Sequence[Group]) -> None:
    runs = counted(sum(len(group.runs) for group in groups), "run")
    say(f"wrote {path}: {runs} in {counted(len(groups), 'group')}")
