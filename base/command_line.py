"""What every script's command line shares: config flags, overrides, errors as one line and an exit
code."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from base.config import Override, load_config
from base.config.files import check_optimization_of
from base.config.imports import FLAG
from base.config.origins import Flag
from base.errors import ConfigError, ProjectError
from base.secrets import without_keys
from base.streams import forgiving_streams
from base.text import LineFormatter, one_line

SHORT_FLAGS = (
    (("--lr", "--learning_rate"), "optimizer.args.lr", "learning rate"),
    (("--wd", "--weight_decay"), "optimizer.args.weight_decay", "weight decay"),
    (("--bs", "--batch_size"), "data_loader.args.batch_size", "minibatch size"),
    (("--conv", "--conv_layer"), "arch.args.conv_layer_type", "convolution type"),
    (("--norm", "--norm_layer"), "arch.args.norm_layer_type", "normalization type"),
    (("--percent",), "trainer.percent", "rate of label noise"),
    (("--subset_percent",), "trainer.subset_percent", "fraction of the training set"),
    (("--sym",), "trainer.sym", "symmetric label noise"),
    (("--asym",), "trainer.asym", "asymmetric label noise"),
    (("--OCNN",), "trainer.OCNN", "OCNN's orthogonality penalty"),
    (("--name", "--exp_name"), "name", "name of the experiment"),
    (("--key", "--comet_key"), "comet.api", "Comet key"),
    (("--offline", "--comet_offline"), "comet.offline", "Comet without a server"),
    (("--seed",), "seed", "seed of everything random"),
)
BOOLEANS = ("trainer.sym", "trainer.asym", "trainer.OCNN", "comet.offline")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the project."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def config_parser(description: str) -> Parser:
    """A parser for scripts that run a config: `-c -r -d --run_dir --set` and ConvNorm's short
    flags."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("-c", "--config", type=path_word, help="config file")
    parser.add_argument(
        "-r",
        "--resume",
        metavar="CHECKPOINT",
        type=path_word,
        help="checkpoint or run folder to continue, in that folder",
    )
    parser.add_argument(
        "-d",
        "--device",
        metavar="INDEX",
        help="CUDA device to use, such as 0; with several, such as 0,1, a process on each (n_gpu)",
    )
    about = "write exactly here instead of <save_dir>/<name>/<run id>"
    parser.add_argument("--run_dir", metavar="DIR", type=path_word, help=about)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a config value, such as trainer.epochs=10",
    )
    add_imports_flag(parser)
    about = "print the resolved config and where each value came from, and do nothing else"
    parser.add_argument("--print-config", action="store_true", help=about)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for flags, key, text in SHORT_FLAGS:
        optional = {"nargs": "?", "const": "true"} if key in BOOLEANS else {}
        parser.add_argument(
            *flags, dest=key, metavar="VALUE", help=f"{text} ({key})", action=KeyFlag, **optional
        )
    return parser


def add_imports_flag(parser: argparse.ArgumentParser) -> None:
    """The flag `--imports`, for every script that reads a config or a checkpoint."""
    parser.add_argument(
        FLAG,
        action="append",
        default=[],
        type=path_word,
        metavar="FILE_OR_MODULE",
        help="run your own code, such as my_layers.py, before the config is checked; may be repeated",
    )


class KeyFlag(argparse.Action):
    """Stores a flag of a config key, and how it was written, which messages name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        written = f"{option_string} {values}"
        namespace.written = {**getattr(namespace, "written", {}), self.dest: written}


def key_flags(arguments: argparse.Namespace, keys: Iterable[str]) -> list[Override]:
    """The overrides that flags of config keys (see `KeyFlag`) stand for, in the order of `keys`."""
    values, written = vars(arguments), getattr(arguments, "written", {})
    given = [key for key in keys if values.get(key) is not None]
    return [Flag((key, values[key]), written.get(key, "")) for key in given]


def path_word(word: str) -> str:
    """A path on the command line, with its home folder, as the shell does not do it behind an
    equals sign or within quotes.

    An empty word is what a script with an unset variable hands over: it does not mean that the flag
    was left out."""
    if not word:
        raise argparse.ArgumentTypeError("expected a path, not an empty word")
    return os.path.expanduser(word)  # noqa: PTH111 - unlike Path's, it leaves the name of a user that is not here


def config_overrides(arguments: argparse.Namespace) -> list[Override]:
    """The config overrides of a parsed command line: `--set` in the order given, then the short
    flags.

    Raises:
        ConfigError: a setting without a value, or flags that contradict each other.
    """
    if arguments.resume and arguments.run_dir:
        raise ConfigError("--run_dir: a resumed run stays in its own folder")
    return set_overrides(arguments.set) + key_flags(arguments, [key for _, key, _ in SHORT_FLAGS])


def set_overrides(settings: Iterable[str], flag: str = "--set") -> list[Override]:
    """The overrides that `--set KEY=VALUE` arguments, or those of another flag, stand for.

    Raises:
        ConfigError: a setting without a value.
    """
    overrides = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {setting}: expected KEY=VALUE")
        overrides.append((key, value))
    return overrides


def training_overrides(arguments: argparse.Namespace) -> list[Override]:
    """`config_overrides` for training, with the devices of `-d` made the only ones that there are:
    `-d 0,1` means a process on each of the two, as the original's DataParallel would use them.

    Raises:
        ConfigError: neither a config nor a run to continue is named, or see `config_overrides` and
            `select_device`.
    """
    devices = select_device(arguments.device)
    overrides = config_overrides(arguments)
    if not arguments.config and not arguments.resume:
        raise ConfigError("-c CONFIG or -r CHECKPOINT is required (see --help)")
    if devices > 1 and "n_gpu" not in dict(overrides):
        overrides.append(Flag(("n_gpu", str(devices)), f"-d {arguments.device}"))
    return overrides


def print_config(arguments: argparse.Namespace, overrides: Iterable[Override]) -> None:
    """Print the config that a run would have, and where each of its values came from: what
    `--print-config` asks for.

    Raises:
        ConfigError, CheckpointError: the config or the checkpoint is wrong or cannot be read.
    """
    if arguments.resume:
        # here and not above: it brings torch
        from base.checkpoint.resume import saved_run

        config = saved_run(arguments.resume, arguments.config, overrides, arguments.imports).config
    else:
        config = load_config(arguments.config, overrides, arguments.imports)
    check_optimization_of(config)
    if os.environ.get("RANK", "0") == "0":
        print(config.describe_origins())
        for warning in config.warnings:
            print(f"warning: {warning}", file=sys.stderr)


def select_device(devices: str | None) -> int:
    """Show only these CUDA devices to torch, such as `"0"` or `"0,1"`; call it before anything uses
    CUDA.

    Returns:
        How many they are; 0 where none is named.

    Raises:
        ConfigError: they are no indices of devices that are there.
    """
    if devices is None:
        return 0
    indices = [index.strip() for index in devices.split(",")]
    if not all(index.isdecimal() for index in indices) or len(set(indices)) < len(indices):
        raise ConfigError(
            f"-d {devices}: expected the index of a CUDA device, such as 0, or several, such as 0,1"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(indices)
    import torch

    found = torch.cuda.device_count()
    if found < len(indices):
        raise ConfigError(
            f"-d {devices}: there is no such CUDA device"
            + (f" (only {found} of them)" if found else "")
        )
    return len(indices)


def select_device_to_evaluate(devices: str | None) -> None:
    """`select_device` for a script that uses one device, or under torchrun one for each process.

    Raises:
        ConfigError: more devices than processes.
    """
    count = select_device(devices)
    if count > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        raise ConfigError(
            f"-d {devices}: a process that evaluates uses one device; validate_pgd.py and fgsm.py share"
            f" out their images under torchrun --nproc_per_node {count}"
        )


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: a `ProjectError` becomes one line on stderr and its exit code; `--debug`
    keeps the traceback.

    Ctrl-C during `main` is exit code 130; once it has ended, only its own exit code counts.
    Whatever becomes of stdout and stderr (see `forgiving_streams`), the work is done to its end.
    Where stdout was closed, nothing is said of that. Where its reader has left, such as `head`, or
    the disk behind it is full, the exit code is 1; the disk is told in one line.
    """
    if logging.lastResort is not None:
        # warnings of scripts without a log go straight to stderr
        logging.lastResort.setFormatter(LineFormatter())
    code = 0
    with forgiving_streams() as streams:
        try:
            try:
                main()
                sys.stdout.flush()
            except ProjectError as error:
                # a run that has saved and stopped says so, even when it is asked again
                _forget_ctrl_c()
                if "--debug" in sys.argv:
                    raise
                print(one_line(without_keys(f"{error}", sys.argv)), file=sys.stderr)
                code = error.exit_code
            _forget_ctrl_c()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        problem = streams.problem()
        if problem is not None:
            code = code or 1
            if not isinstance(problem, BrokenPipeError):
                print(f"standard output: cannot be written: {problem.strerror}", file=sys.stderr)
    ranks = sys.modules.get("base.distributed.session")
    if ranks is not None and ranks.world_size() > 1:
        ranks.end_process(code)
    sys.exit(code)


def _forget_ctrl_c() -> None:
    # unlike SIG_IGN, not for processes that are still started
    signal.signal(signal.SIGINT, lambda *_: None)
