"""Run a study: every variant and seed of a grid file.

Finished runs are skipped, interrupted ones are continued.

python run_ablations.py --list
python run_ablations.py --config baseline cosine_schedule no_batchnorm --jobs 2
python run_ablations.py --all --seed 42 --dry-run
python run_ablations.py --grid configs/ablations/label_noise.json --all --launcher slurm
"""

from pathlib import Path

import base.startup  # noqa: F401 - before slow imports

# It fills the tables that configs are checked against.
import experiment  # noqa: F401
from base.command_line import Parser, add_imports_flag, run_script, set_overrides
from base.errors import ConfigError, ProjectError
from base.text import say
from studies.grid import describe, plan, record
from studies.launchers import LAUNCHERS, format_command, launcher
from studies.work import Study

DEFAULT_GRID = Path(__file__).parent / "configs" / "ablations" / "resnet.json"


def arguments_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Run every variant and seed of a grid file.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--grid",
        type=Path,
        default=DEFAULT_GRID,
        metavar="FILE",
        help="grid file (default: the ResNet ablations)",
    )
    add("--list", action="store_true", help="print a line per variant, with what it sets")
    add(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="run these variants",
    )
    add("--all", action="store_true", help="run all variants")
    add("--seed", type=int, nargs="+", default=[], help="seeds to use instead of the grid's")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a config value in all variants",
    )
    add_imports_flag(parser)
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="how many runs at once (default: 1; with --launcher slurm all)",
    )
    add(
        "--save_dir",
        type=Path,
        metavar="DIR",
        help="write here instead of <trainer.save_dir>/<grid's name>",
    )
    add(
        "--launcher",
        choices=LAUNCHERS,
        default="process",
        help="processes of this machine, or jobs of submitit (default: process)",
    )
    add(
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of submitit's executor, such as timeout_min=600",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main() -> None:
    arguments = arguments_parser().parse_args()
    # All configs are checked here, so that the last run does not fail after days.
    runs = plan(
        arguments.grid,
        arguments.config,
        arguments.seed,
        arguments.save_dir,
        set_overrides(arguments.set),
        arguments.imports,
    )
    if arguments.list:
        say(*describe(runs))
        return
    if arguments.all == bool(arguments.config):
        raise ConfigError("one of --config NAME ... and --all is required (--list shows the names)")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, not {arguments.jobs}")
    if arguments.dry_run:
        say(*map(format_command, runs))
        return
    folder = runs[0].folder.parent
    # A cluster queues what it has no room for.
    at_once = arguments.jobs or (len(runs) if arguments.launcher == "slurm" else 1)
    # A study of two runs has no use for more, and each of them gets half of the cores.
    jobs = min(at_once, len(runs))
    launch = launcher(arguments.launcher, folder / "jobs", arguments.parameter, jobs)
    record(runs)
    failures = Study(runs, launch, jobs).work()
    say(f"{len(runs) - len(failures)} of {len(runs)} runs are finished, in {folder}")
    if failures:
        reasons = "; ".join(f"{run.name} ({reason})" for run, reason in failures.items())
        raise ProjectError(f"failed: {reasons}")


if __name__ == "__main__":
    run_script(main)
