"""All comparisons in one table; see README.md of this folder.

    python -m benchmarks --json result.json --table result.md
    python -m benchmarks --only conv_norm_step memory --threads 1

Shows in seconds that everything runs, with numbers that mean nothing:

    python -m benchmarks --smoke
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

from base.checkpoint import find_checkpoint
from base.command_line import Parser, run_script
from base.device import choose_device
from base.errors import ConfigError
from base.output import check_outputs, save_json, write_output, writing
from base.registry import lookup
from benchmarks import (
    adversarial_step,
    attack_libraries,
    conv_norm_step,
    growth,
    loading,
    machine,
    memory,
    startup,
    studies_hours,
    training_step,
    two_at_once,
)
from benchmarks.rows import BenchmarkRow, BenchmarkTable, Settings
from benchmarks.table import format_markdown, format_text, summary

COMPARISONS: dict[str, Callable[[Settings], Sequence[BenchmarkRow | BenchmarkTable]]] = {
    "conv_norm_step": conv_norm_step.measure,
    "memory": memory.measure,
    "training_step": training_step.measure,
    "two_at_once": two_at_once.measure,
    "loading": loading.measure,
    "adversarial_step": adversarial_step.measure,
    "attack_libraries": attack_libraries.measure,
    "startup": startup.measure,
    "growth": growth.measure,
    "studies_hours": studies_hours.measure,
}


def main() -> None:
    arguments = _parser().parse_args()
    settings = _settings(arguments)
    hardware = machine.hardware(settings.device)
    results: dict[str, list[BenchmarkRow | BenchmarkTable]] = {}
    seconds: dict[str, float] = {}
    # A name that is given twice is measured once.
    names = dict.fromkeys(arguments.only or COMPARISONS)
    bar = tqdm(names, disable=None, leave=False)
    for name in bar:
        bar.set_description(name)
        start = perf_counter()
        results[name] = [_without_goal(item, settings) for item in COMPARISONS[name](settings)]
        seconds[name] = perf_counter() - start
        # After every comparison, so that an interrupted run keeps what it has measured.
        if arguments.json:
            report = {
                "hardware": hardware,
                "smoke": settings.smoke,
                "seconds": seconds,
                "results": {
                    name: [item.as_dict() for item in found] for name, found in results.items()
                },
            }
            save_json(arguments.json, report)
    lines = [
        machine.describe(hardware),
        f"{summary(results)}, in {sum(seconds.values()) / 60:.1f} minutes",
    ]
    if not hardware["native_bf16"]:
        lines.append(
            "no rows in bf16: this device does not multiply bf16 natively, so such times would say"
            " nothing"
        )
    if settings.smoke:
        lines.append(
            "--smoke: tiny networks and images, one repeat; these numbers say nothing about speed"
        )
    if arguments.table:
        text = "\n\n".join([*lines, format_markdown(results)])
        with writing(arguments.table):
            write_output(arguments.table, text.encode())
    print(format_text(results), *lines, sep="\n\n")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks",
        description="Side-by-side timings against named peers.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(COMPARISONS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write the table here, in Markdown"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of torch; by default its own choice"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        help="run or checkpoint of a robust network to attack in addition",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=64,
        metavar="N",
        help="test images of --checkpoint that are attacked (64)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny and quick: shows that everything runs"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line asks for.

    Raises:
        ConfigError, CheckpointError: a value is invalid; found before anything is measured.
    """
    for name in arguments.only or ():
        lookup(COMPARISONS, name, "--only")
    for flag in ("threads", "images"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag}: expected at least 1, not {value}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible")
    if arguments.checkpoint:
        find_checkpoint(arguments.checkpoint)
    check_outputs({"--json": arguments.json, "--table": arguments.table}, {})
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    return Settings(
        device, torch.get_num_threads(), arguments.smoke, arguments.checkpoint, arguments.images
    )


def _without_goal(
    item: BenchmarkRow | BenchmarkTable, settings: Settings
) -> BenchmarkRow | BenchmarkTable:
    # The goals are for real networks, not for the tiny ones of --smoke.
    if settings.smoke and isinstance(item, BenchmarkRow):
        return replace(item, goal=None)
    return item


if __name__ == "__main__":
    run_script(main)
