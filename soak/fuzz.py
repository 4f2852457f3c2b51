"""A fuzzer for what is read: mutates configs and checkpoints as coverage suggests, and stops at all but a result or one line.

pip install -e ".[fuzz]"
python -m soak.fuzz config --seconds 600
python -m soak.fuzz checkpoint --seconds 600
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["base", "torch._weights_only_unpickler"]):
    import torch

    from base.checkpoint import load_checkpoint, save_checkpoint
    from base.config_files import load_config, validate
    from base.errors import ProjectError
    from base.optimization import check_optimization
    from base.resuming import saved_run

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 1, "mean": [0.5, 0.5, 0.5]}


def read_config(file: Path) -> None:
    """As train.py does, before it looks for data."""
    config = load_config(file)
    check_optimization(config.optimizer, config.lr_scheduler)
    if validate(config.dump()).dump() != config.dump():
        raise AssertionError("the resolved config is another one when it is read again")


def read_checkpoint(file: Path) -> None:
    """As evaluation and resume do."""
    load_checkpoint(file)
    saved_run(str(file))


def config_seeds() -> list[bytes]:
    """All shipped configs."""
    return [file.read_bytes() for file in sorted(CONFIGS.rglob("*.json")) if file.name != "schema.json"]


def checkpoint_seeds() -> list[bytes]:
    """A sealed checkpoint, one of ConvNorm's form, and one in torch's older format; the last two have no seal."""
    config = load_config(CONFIGS / "quickstart.json").dump()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "sealed"), {**SMALL, "config": config})
        seeds = [Path(folder, "sealed").read_bytes()]
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({**SMALL, "config": config}, file, _use_new_zipfile_serialization=zipped)
        seeds.append(file.getvalue())
    return seeds


TARGETS: dict[str, tuple[Callable[[Path], None], Callable[[], list[bytes]]]] = {
    "config": (read_config, config_seeds),
    "checkpoint": (read_checkpoint, checkpoint_seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz what is read.")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for inputs that break something")
    arguments = parser.parse_args()
    read, seeds = TARGETS[arguments.target]
    folder = Path(tempfile.mkdtemp())
    file, corpus = folder / "input", folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read(file)
        except ProjectError as error:
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"{len(str(error).splitlines())} lines: {error}") from error

    options = [f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}", "-print_final_stats=1", "-rss_limit_mb=8000"]
    options += ["-max_len=20000", "-timeout=20", f"-artifact_prefix={arguments.findings}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
