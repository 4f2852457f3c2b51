"""Run a study: every variant and seed of a grid file. What is finished is skipped, what was broken
off is continued.

python run_ablations.py --config baseline cosine_schedule no_batchnorm --jobs 2    # --list shows the names
python run_ablations.py --all --seed 42 --dry-run
python run_ablations.py --grid configs/ablations/label_noise.json --all --launcher slurm --parameter timeout_min=600
"""

from pathlib import Path

import experiment  # noqa: F401 - it fills the tables that configs are checked against
from base.command_line import Parser, add_imports_flag, run_script, set_overrides
from base.errors import ConfigError, ProjectError
from base.text import say
from studies.grid import describe, plan, record
from studies.launchers import LAUNCHERS, format_command, launcher
from studies.work import Study

DEFAULT = Path(__file__).parent / "configs" / "ablations" / "resnet.json"


def arguments_parser() -> Parser:
    parser = Parser(description="Run every variant and seed of a grid file.", allow_abbrev=False)
    parser.add_argument(
        "--grid",
        type=Path,
        default=DEFAULT,
        metavar="FILE",
        help="grid file (the ResNet ablations)",
    )
    parser.add_argument(
        "--list", action="store_true", help="print a line per variant, with what it sets"
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="run these variants",
    )
    parser.add_argument("--all", action="store_true", help="run all variants")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[], help="instead of the grid's seeds"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in all variants"
    )
    add_imports_flag(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many runs at once")
    parser.add_argument(
        "--save_dir", type=Path, metavar="DIR", help="instead of <trainer.save_dir>/<grid's name>"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="process", help="here, or by submitit"
    )
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit's executor",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main() -> None:
    arguments = arguments_parser().parse_args()
    grid, names, overrides = arguments.grid, arguments.config, set_overrides(arguments.set)
    runs = plan(grid, names, arguments.seed, arguments.save_dir, overrides, arguments.imports)
    if arguments.list:
        say(*describe(runs))
        return
    if arguments.all == bool(arguments.config):
        raise ConfigError("one of --config NAME ... and --all is required (--list shows the names)")
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, not {arguments.jobs}")
    if arguments.dry_run:
        say(*map(format_command, runs))
        return
    launch = launcher(arguments.launcher, runs[0].folder.parent / "jobs", arguments.parameter)
    record(runs)
    failures = Study(runs, launch, arguments.jobs).work()
    say(f"{len(runs) - len(failures)} of {len(runs)} runs are finished, in {runs[0].folder.parent}")
    if failures:
        raise ProjectError(
            "failed: " + "; ".join(f"{run.name} ({reason})" for run, reason in failures.items())
        )


if __name__ == "__main__":
    run_script(main)
