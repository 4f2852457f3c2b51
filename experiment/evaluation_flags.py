"""The flags of the commands that evaluate a checkpoint, or a network of the user's own."""

import argparse
from pathlib import Path
from typing import Any

from base.checkpoint.find import find_run
from base.command_line import Parser, add_imports_flag, path_word
from base.config.files import read_layers
from base.config.strict_json import JSONError, parse_json
from base.errors import ConfigError
from base.output import PICTURES, check_outputs
from base.run_folder.names import METRICS
from base.text import one_line

NETWORK_FLAGS = ("data", "model_args", "mean", "std", "image_size")
"""Flags that need `--model`."""

LARGEST_SIDE = 8192


def evaluation_parser(
    description: str, *, json: str = "write the report here", figure: str = "draw the picture here"
) -> Parser:
    """Return a parser with the flags that all these commands share.

    `json` and `figure` are the help texts of these flags.
    """
    # An abbreviation could mean another flag once more flags are added.
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "-s",
        "--checkpoint",
        "--checkpoint_path",
        dest="checkpoint",
        type=_checkpoint_word,
        help="checkpoint, or run folder, which stands for its best model; with --model its weights",
    )
    parser.add_argument(
        "-c",
        "--config",
        type=path_word,
        help="config file; not needed if the checkpoint holds its own",
    )
    parser.add_argument(
        "-d",
        "--device",
        metavar="INDEX",
        help="CUDA device to use, such as 0; with torchrun several",
    )
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="which weights, if a file of other code holds several sets",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a config value"
    )
    add_imports_flag(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"{json}; - is standard output")
    parser.add_argument("--figure", type=Path, metavar="FILE", help=f"{figure} (png, pdf or svg)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_network_flags(parser)
    return parser


def _checkpoint_word(word: str) -> str:
    """Return `path_word(word)`, or for a folder that contains a single run the run's folder."""
    return str(find_run(path_word(word)))


def _add_network_flags(parser: Parser) -> None:
    own = parser.add_argument_group("a network of your own")
    own.add_argument(
        "--model",
        metavar="FILE.py:NAME",
        type=path_word,
        help="function that returns a torch.nn.Module, or MODULE:NAME of an installed package",
    )
    own.add_argument(
        "--model_args",
        nargs="+",
        action="extend",
        default=[],
        type=_named_value,
        metavar="NAME=VALUE",
        help="its arguments, in JSON, such as num_classes=10",
    )
    own.add_argument(
        "--data",
        type=path_word,
        metavar="DIR",
        help="test images: test/<class>/, or <class>/, or a folder of CIFAR's own files",
    )
    own.add_argument(
        "--image_size", type=_side, metavar="N", help="side that they are resized and cropped to"
    )
    own.add_argument(
        "--mean",
        type=_mean,
        metavar="R,G,B",
        help="normalize the pixels by these, if the network does not do it itself",
    )
    own.add_argument("--std", type=_std, metavar="R,G,B", help="see --mean")


def _named_value(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, not {one_line(word, 80)!r}")
    try:
        return name, parse_json(text)
    except JSONError:
        # A word that is not JSON is a string, so that users need not quote quotes.
        return name, text


def _side(text: str) -> int:
    side = int(text) if text.isdecimal() else 0
    if not 1 <= side <= LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"expected 1 to {LARGEST_SIDE}, not {one_line(text, 80)}")
    return side


def _mean(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers in [0, 1], not {text}")
    return numbers


def _std(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 and at most 1, not {text}")
    return numbers


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise argparse.ArgumentTypeError(
            "expected a number for each channel, one or three, such as 0.49,0.48,0.45,"
            f" not {one_line(text, 80)!r}"
        )
    return numbers


def check_evaluation_outputs(arguments: argparse.Namespace, **outputs: str | Path | None) -> None:
    """Check, before the work, that the flags fit each other and that the outputs can be written.

    An output must not be a file that is being read.

    Args:
        arguments: parsed by an `evaluation_parser`.
        outputs: the files of other flags, by the flag's name without dashes.

    Raises:
        ConfigError: naming the flag.
    """
    _check_network_flags(arguments)
    # A config's parents are input, too.
    layers = read_layers(arguments.config) if arguments.config else []
    read = [layer.file for layer in layers]
    folders = []
    if arguments.checkpoint is not None:
        source = Path(arguments.checkpoint)
        read.append(source)
        if not source.is_dir():
            # A checkpoint usually lies in its run folder.
            source = source.parent
        folders.append(source)
    if arguments.model is not None:
        read.append(Path(arguments.model.rpartition(":")[0]))
    more = {f"--{name}": path for name, path in outputs.items()}
    check_outputs(
        {"--json": arguments.json, "--figure": arguments.figure, **more},
        {"--figure": PICTURES},
        files=read,
        folders=[folder for folder in folders if (folder / METRICS).exists()],
    )


def _check_network_flags(arguments: argparse.Namespace) -> None:
    """Check that a network is named, and that no flags contradict each other."""
    if arguments.model is None:
        if arguments.checkpoint is None:
            raise ConfigError("-s/--checkpoint or --model: required (see --help)")
        for name in NETWORK_FLAGS:
            if getattr(arguments, name):
                raise ConfigError(f"--{name}: belongs to a network of --model, which is not given")
        return
    if arguments.data is None:
        raise ConfigError("--data: required with --model: the folder of the test images")
    if arguments.config is not None:
        raise ConfigError("-c and --model: both name a network; give one of them")
    if arguments.ema:
        raise ConfigError("--ema and --model: name the weights with -s, and --weights if needed")
    if arguments.weights is not None and arguments.checkpoint is None:
        raise ConfigError("--weights: needs a file, -s FILE")
    mean, std = arguments.mean, arguments.std
    if (mean is None) != (std is None):
        given, missing = ("--std", "--mean") if mean is None else ("--mean", "--std")
        raise ConfigError(f"{given}: needs {missing}, too")
    if mean is not None and len(mean) != len(std):
        raise ConfigError(
            f"--mean and --std: {len(mean)} and {len(std)} numbers; expected the same number"
        )
