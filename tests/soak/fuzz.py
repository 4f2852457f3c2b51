"""A fuzzer for configs and checkpoints, which must give a result or an error of one line.

    pip install -e ".[fuzz]"
    python -m tests.soak.fuzz config --seconds 600
    python -m tests.soak.fuzz checkpoint --seconds 600
    python -m tests.soak.fuzz values --seconds 600

`config` and `checkpoint` are changed byte by byte, guided by the coverage of this project's code
(atheris, on Linux). `values` are complete checkpoints in which one value is replaced at random.
Checkpoints that can be resumed are trained for one step.
"""

import argparse
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from shutil import copyfile
from time import monotonic


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz configs and checkpoints.")
    parser.add_argument("target", choices=["config", "checkpoint", "values"])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--findings", type=Path, default=Path(), help="folder for inputs that break something"
    )
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    if arguments.target == "values":
        sys.exit(fuzz_values(folder, arguments))
    fuzz_bytes(folder, arguments)


def fuzz_bytes(folder: Path, arguments: argparse.Namespace) -> None:
    """Let atheris mutate the seeds of a target; it ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["base", "tests.soak.targets", "torch._weights_only_unpickler"]
    ):
        from tests.soak.targets import TARGETS, examine
    file, corpus = folder / "input", folder / "corpus"
    corpus.mkdir()
    seeds = TARGETS[arguments.target][1]()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        file.write_bytes(data)
        examine(arguments.target, file)

    options = [
        f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}",
        "-print_final_stats=1",
        "-rss_limit_mb=8000",
        f"-max_len={max(map(len, seeds))}",
        "-timeout=20",
        f"-artifact_prefix={arguments.findings}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def fuzz_values(folder: Path, arguments: argparse.Namespace) -> int:
    """Resume checkpoints with one replaced value until the time is over; return the exit code.

    It is 1 if one of them breaks something.
    """
    from tests.soak.targets import examine, write_corrupted_checkpoint

    file, random, counts = folder / "input", Random(arguments.seed), [0, 0]
    end = monotonic() + arguments.seconds
    while monotonic() < end:
        write_corrupted_checkpoint(file, random)
        try:
            counts[examine("checkpoint", file)] += 1
        except Exception:
            finding = arguments.findings / f"finding_{arguments.seed}_{sum(counts)}.pth"
            copyfile(file, finding)
            traceback.print_exc()
            print(f"FAILED: {finding}", file=sys.stderr)
            return 1
    print(
        f"{sum(counts)} checkpoints: {counts[True]} were resumed,"
        f" {counts[False]} were refused in one line"
    )
    return 0


if __name__ == "__main__":
    main()
