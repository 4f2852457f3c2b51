"""A training job: from a command line to a run, in this process, in those that torchrun has started, or in `n_gpu` new ones."""

import argparse
from collections.abc import Callable
from pathlib import Path

from base.checkpoint import has_checkpoint
from base.command_line import config_overrides, read_config, select_device
from base.config.config import Config
from base.config.files import origins_named
from base.config.origins import Flag
from base.launch import launch
from base.ranks import from_first, rank, ranks, started_processes
from base.resuming import saved_run
from base.run_folder import begun_by_this_job
from experiment.experiment import Experiment


def run_job(arguments: argparse.Namespace, refuse: Callable[[Config], None]) -> None:
    """Begin the run that the command line describes, or continue the one that it names.

    Where torchrun starts the processes anew after one has died or reported an error (`--max-restarts`), it repeats the command;
    a run that has reached a checkpoint in `--run_dir` by then goes on there.

    Args:
        arguments: as `base.command_line.config_parser` parses them.
        refuse: raises a `ConfigError` for configs that the script is not for; not asked about runs that are continued.
    """
    devices = select_device(arguments.device)
    overrides = config_overrides(arguments)
    if devices > 1 and "n_gpu" not in dict(overrides):
        # -d 0,1 means a process on each of the two, as the original's DataParallel would use them
        overrides.append(Flag(("n_gpu", str(devices)), f"-d {arguments.device}"))
    with ranks(training=True):
        source = arguments.resume or from_first(lambda: _left_by_last_attempt(arguments.run_dir))
        if source:
            saved = saved_run(source, arguments.config, overrides, arguments.imports)
            config = saved.config
        else:
            config = read_config(arguments, overrides)
            with origins_named(config):
                refuse(config)
        if arguments.print_config:
            if rank() == 0:
                print(config.describe_origins())
            return
        with origins_named(config):
            if started_processes() == 1 and config.n_gpu > 1:
                launch(config)
            elif source:
                Experiment.continue_run(saved)
            else:
                Experiment.from_config(config).run(arguments.run_dir)


def _left_by_last_attempt(run_dir: str | None) -> str | None:
    """The run folder, where an earlier attempt of the same job has made it and has saved a checkpoint in it."""
    if run_dir is None:
        return None
    folder = Path(run_dir).expanduser()
    return run_dir if has_checkpoint(folder) and begun_by_this_job(folder) else None
