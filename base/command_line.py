"""What the commands share: flags of config keys, overrides, errors as one line, exit codes."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from base.allocator import keep_freed_memory
from base.config import Override, load_config
from base.config.files import check_optimization_of
from base.config.imports import FLAG
from base.config.origins import Flag
from base.errors import ConfigError, ProjectError, Stopped
from base.secrets import without_keys
from base.streams import forgiving_streams
from base.text import TerminalFormatter, one_line

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
    """An argument parser that raises `ConfigError`, so that its errors are reported like others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def config_parser(description: str) -> Parser:
    """Return the parser of a command that trains, with ConvNorm's short flags."""
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
    parser.add_argument(
        "--run_dir",
        metavar="DIR",
        type=path_word,
        help="write exactly here instead of <save_dir>/<name>/<run id>",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a config value, such as trainer.epochs=10",
    )
    add_imports_flag(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved config and where each value came from, and do nothing else",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for flags, key, text in SHORT_FLAGS:
        flag = parser.add_argument(
            *flags, dest=key, metavar="VALUE", help=f"{text} ({key})", action=KeyFlag
        )
        if key in BOOLEANS:
            # `--sym` alone means `--sym true`.
            flag.nargs = "?"
            flag.const = "true"
    return parser


def add_imports_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--imports`, which every command has that reads a config or a checkpoint."""
    parser.add_argument(
        FLAG,
        action="append",
        default=[],
        type=path_word,
        metavar="FILE_OR_MODULE",
        help="import your own code, such as my_layers.py, before the config is checked; repeatable",
    )


class KeyFlag(argparse.Action):
    """Stores the value of a config key, and the flag as the user typed it, for messages."""

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
    """Return the overrides from flags of config keys (see `KeyFlag`), in the order of `keys`."""
    values = vars(arguments)
    written = getattr(arguments, "written", {})
    given = [key for key in keys if values.get(key) is not None]
    return [Flag((key, values[key]), written.get(key, "")) for key in given]


def path_word(word: str) -> str:
    """Return a path of the command line with `~` expanded.

    The shell does not expand it behind an equals sign or within quotes.
    """
    if not word:
        # A shell script with an unset variable passes "". That is not the same as no flag.
        raise argparse.ArgumentTypeError("expected a path, not an empty word")
    # Path.expanduser raises for an unknown user; this leaves the path unchanged.
    return os.path.expanduser(word)  # noqa: PTH111


def config_overrides(arguments: argparse.Namespace) -> list[Override]:
    """Return the config overrides of a parsed command line: those of `--set`, then short flags.

    Raises:
        ConfigError: a setting without a value, or flags that contradict each other.
    """
    if arguments.resume and arguments.run_dir:
        raise ConfigError("--run_dir: a resumed run stays in its own folder")
    return set_overrides(arguments.set) + key_flags(arguments, [key for _, key, _ in SHORT_FLAGS])


def set_overrides(settings: Iterable[str], flag: str = "--set") -> list[Override]:
    """Return the overrides given by `--set KEY=VALUE`, or by another flag of the same form.

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
    """Return `config_overrides` for training, after showing torch only the devices of `-d`.

    `-d 0,1` starts a process on each of the two, where the original used DataParallel.

    Raises:
        ConfigError: neither a config nor a run to continue is named; or see `config_overrides` and
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
    """Print the config that a run would have, and where each of its values came from.

    Raises:
        ConfigError, CheckpointError: the config or the checkpoint is wrong or cannot be read.
    """
    if arguments.resume:
        # At the top of the file it would make every command import torch.
        from base.checkpoint.resume import saved_run

        config = saved_run(arguments.resume, arguments.config, overrides, arguments.imports).config
    else:
        config = load_config(arguments.config, overrides, arguments.imports)
    check_optimization_of(config)
    if os.environ.get("RANK", "0") == "0":
        print(config.describe_origins())
        for warning in config.warnings:
            print(f"warning: {warning}", file=sys.stderr)


VISIBLE = "CONVNORM_VISIBLE_DEVICES"
"""The environment variable that holds `CUDA_VISIBLE_DEVICES` as it was before `select_device`."""

ALL = "all"
"""The value of `VISIBLE` where `CUDA_VISIBLE_DEVICES` was not set."""


def select_device(devices: str | None) -> int:
    """Show only these CUDA devices to torch, such as `"0"` or `"0,1"`.

    They are indices into `CUDA_VISIBLE_DEVICES`, where a cluster or a container has set it. It must
    be called before anything uses CUDA.

    Returns:
        The number of devices; 0 for None.

    Raises:
        ConfigError: `devices` are not indices, or this process does not see as many devices.
    """
    if devices is None:
        return 0
    indices = [index.strip() for index in devices.split(",")]
    if not all(index.isdecimal() for index in indices) or len(set(indices)) < len(indices):
        raise ConfigError(
            f"-d {devices}: expected the index of a CUDA device, such as 0, or several, such as 0,1"
        )
    # A process that this one starts has the same flag, and must not choose among the chosen ones.
    visible = os.environ.setdefault(VISIBLE, os.environ.get("CUDA_VISIBLE_DEVICES", ALL))
    if visible != ALL:
        names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        if int(max(indices, key=int)) >= len(names):
            raise ConfigError(
                f"-d {devices}: CUDA_VISIBLE_DEVICES is {visible!r}: expected indices below"
                f" {len(names)}"
            )
        indices = [names[int(index)].strip() for index in indices]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(indices)
    # CUDA reads the variable once, when torch first asks for its devices.
    import torch

    found = torch.cuda.device_count()
    if found < len(indices):
        raise ConfigError(
            f"-d {devices}: asks for {len(indices)} CUDA devices, of which {found} exist"
        )
    return len(indices)


def select_device_to_evaluate(devices: str | None) -> None:
    """Call `select_device` for a command that uses one device, or one per process of torchrun.

    Raises:
        ConfigError: more devices than processes.
    """
    count = select_device(devices)
    if count > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        raise ConfigError(
            f"-d {devices}: a process that evaluates uses one device; to divide the images of"
            f" validate_pgd.py or fgsm.py, start it with torchrun --nproc_per_node {count}"
        )


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit with 0, or with the exit code of the `ProjectError` that it raised.

    The error is one line on stderr that begins with `error: `; with `--debug` it is a traceback.
    Ctrl-C during `main` exits with 130. Once `main` has ended, Ctrl-C no longer changes the code.

    A closed or broken stdout or stderr does not stop the work (see `forgiving_streams`). The exit
    code is 1 if the reader of stdout has left, such as `head`, or if its disk is full; only the
    full disk is reported. A stdout that was closed from the start is not an error.
    """
    keep_freed_memory()
    if logging.lastResort is not None:
        # A command without a log of its own sends its warnings to stderr through this handler.
        logging.lastResort.setFormatter(TerminalFormatter())
    code = 0
    with forgiving_streams() as streams:
        try:
            try:
                _interrupt_on_ctrl_c()
                main()
                # A user's own code may have set it to None
                if sys.stdout is not None:
                    sys.stdout.flush()
            except ProjectError as error:
                # A run that has saved and stopped must say so, even if Ctrl-C comes again.
                _ignore_ctrl_c()
                if "--debug" in sys.argv:
                    raise
                print(error_line(error), file=sys.stderr)
                code = error.exit_code
            _ignore_ctrl_c()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        problem = streams.problem()
        if problem is not None:
            code = code or 1
            if not isinstance(problem, BrokenPipeError):
                reason = f"standard output: cannot be written: {problem.strerror}"
                print(f"error: {reason}", file=sys.stderr)
    # Importing `session` would import torch; without it there is only one process.
    session = sys.modules.get("base.distributed.session")
    if session is not None and session.world_size() > 1:
        session.end_process(code)
    sys.exit(code)


def error_line(error: ProjectError) -> str:
    """Return the line that a command prints for an error, without the keys of its command line."""
    line = one_line(without_keys(str(error), sys.argv))
    if isinstance(error, Stopped):
        # The run ended as it was asked to.
        return line
    return f"error: {line}"


def _interrupt_on_ctrl_c() -> None:
    # Until now Ctrl-C has ended the process at once.
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == "base.startup":
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _ignore_ctrl_c() -> None:
    # Processes that are started later would inherit SIG_IGN; they do not inherit a handler.
    signal.signal(signal.SIGINT, lambda *_: None)
