"""What plot_training_logs.py does: run folders -> a picture, a table."""

import argparse
from collections.abc import Sequence

from base.errors import ConfigError
from base.output import PICTURES, check_outputs
from base.text import say
from reports import tables
from reports.attack_columns import attack_columns
from reports.curves import against_figure, curves_figure
from reports.groups import Group, finished_groups, group_runs
from reports.panels import save_figure
from reports.runs import LAST_EPOCH, find_runs, refuse_unknown

NEEDED = {
    "out": ("metric",),
    "table": ("result", "last_epoch", "eval", "baseline"),
    "baseline": ("paired",),
}
"""Arguments that others are of no use without."""


def write_reports(arguments: argparse.Namespace) -> None:
    """Write the picture and the table that the parsed command line asks for.

    Raises:
        ConfigError: one line that names the flag, the run folder or the file.
    """
    _check(arguments)
    runs, key = find_runs(arguments.paths), arguments.against
    check_outputs(
        {"--out": arguments.out, "--table": arguments.table},
        {"--out": PICTURES, "--table": tables.FORMATS},
        folders=[place for run in runs for place in (run.folder, run.folder.parent)],
    )
    by = arguments.group_by
    if not by and not key and all(run.labels for run in runs):
        by = ["variant"]
    keys = [*(one for one in by if one != key), *([key] if key else [])]
    groups = group_runs(runs, keys)
    finished = finished_groups(groups) if arguments.table or key else []
    shown = finished if key else groups
    if arguments.out and key:
        figure = against_figure(finished, key, arguments.metric)
    elif arguments.out:
        figure = curves_figure(groups, arguments.metric)
    if arguments.table:
        table = tables.compare(
            finished,
            _columns(arguments, finished),
            arguments.baseline,
            by_last_key=bool(key and keys[1:]),
            paired=arguments.paired,
        )
        tables.write_table(arguments.table, table)
    if arguments.out:
        save_figure(figure, arguments.out)
        _say_written(arguments.out, shown)
    if arguments.table:
        _say_written(arguments.table, finished)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse a command line that asks for nothing, and flags that have no effect."""
    if not (arguments.out or arguments.table):
        raise ConfigError(
            "nothing to write: name a picture with --out FILE or a table with --table FILE"
        )
    given = {name for name, value in vars(arguments).items() if value}
    for needed, names in NEEDED.items():
        useless = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if useless and needed not in given:
            what = "ROW" if needed == "baseline" else "FILE"
            raise ConfigError(f"{' and '.join(useless)}: no effect without --{needed} {what}")


def _columns(arguments: argparse.Namespace, finished: Sequence[Group]) -> list[str] | None:
    """The columns that the command line asks for; None for the usual ones."""
    logged = [name for group in finished for run in group.runs for name in run.log[-1]]
    last_epoch = arguments.last_epoch or []
    refuse_unknown("--last-epoch", last_epoch, logged, "no run logs it in its last epoch")
    columns = [
        *(arguments.result or []),
        *(f"{LAST_EPOCH}{name}" for name in last_epoch),
        *attack_columns(finished, arguments.eval or []),
    ]
    return columns or None


def _say_written(path: str, groups: Sequence[Group]) -> None:
    say(f"wrote {path}: {sum(len(group.runs) for group in groups)} runs in {len(groups)} groups")
