"""The flags of every command that evaluates a checkpoint."""

import argparse
from pathlib import Path

from base.checkpoint import the_run_in
from base.command_line import Parser, add_imports_flag, path_word
from base.config.files import config_chain
from base.output import PICTURES, check_outputs


def evaluation_parser(
    description: str, *, json: str = "write the report here", figure: str = "draw the picture here"
) -> Parser:
    """The flags of every script that evaluates a checkpoint, `-s -c -d --ema --set --json --figure --debug`; `json` and
    `figure` say what is written."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "-s",
        "--checkpoint",
        "--checkpoint_path",
        dest="checkpoint",
        required=True,
        type=_checkpoint_word,
        help="checkpoint, or run folder, which stands for its best model",
    )
    parser.add_argument("-c", "--config", type=path_word, help="config file; not needed where the checkpoint holds its own")
    parser.add_argument(
        "-d",
        "--device",
        metavar="INDEX",
        help="CUDA device to use, such as 0; with torchrun several",
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    several = "which weights, where another code's file holds several sets"
    parser.add_argument("--weights", metavar="NAME", help=several)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a config value")
    add_imports_flag(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"{json}; - is standard output")
    parser.add_argument("--figure", type=Path, metavar="FILE", help=f"{figure} (png, pdf or svg)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _checkpoint_word(word: str) -> str:
    """As `path_word`; a folder above a single run becomes that run's, where reports then go."""
    return str(the_run_in(path_word(word)))


def check_evaluation_outputs(arguments: argparse.Namespace) -> None:
    """Refuse a `--json` or `--figure` that cannot be written, or is a file that is being read,
    before the work.

    Raises:
        ConfigError: naming the flag.
    """
    source = Path(arguments.checkpoint)
    # a checkpoint that lies in its run folder
    folders = [source if source.is_dir() else source.parent]
    check_outputs(
        {"--json": arguments.json, "--figure": arguments.figure},
        {"--figure": PICTURES},
        files=[source, *(config_chain(arguments.config) if arguments.config else [])],
        folders=[folder for folder in folders if (folder / "metrics.jsonl").exists()],
    )
