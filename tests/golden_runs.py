"""Compares the golden runs of two checkouts: a refactor keeps every byte, or its commit says why.

    python tests/golden_runs.py CLONE_A CLONE_B

Trains every method, with batch normalization and with ConvNorm, in one process and in two, from
the command line of each checkout on one thread, and compares every value of `metrics.jsonl`, times
aside, and every bit of the final weights. Prints a line for each run and exits with 1 if one
differs. It takes about two minutes on two cores and is not part of the test suite. It uses only
what every version has: the commands' flags, config keys and the file names of a run folder.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from socket import socket
from typing import Any

import torch

LAYERS = {
    "plain": {"conv_layer_type": "conv", "norm_layer_type": "bn"},
    "conv_norm": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"},
}
METHODS: dict[str, dict[str, Any]] = {
    "standard": {"augmentation": {"cutout": 4}, "trainer": {"sym": True, "percent": 0.3}},
    "free": {"adversarial": {"method": "free"}, "trainer": {"adv_repeats": 2}},
    "fgsm": {"adversarial": {"method": "fgsm"}, "trainer": {"ema_decay": 0.9}},
    "pgd": {"adversarial": {"method": "pgd"}},
    "trades": {"adversarial": {"method": "trades", "norm": "l2", "epsilon": 0.5, "step_size": 0.2}},
}
PROCESSES = (1, 2)
TIMES = ("seconds", "images_per_second")
"""Ends of the names of values that differ from one run to the next."""


def config(method: str, layers: str) -> dict[str, Any]:
    """The config of one run: two epochs of three minibatches, which two processes share
    unevenly.
    """
    own = METHODS[method]
    attack = {"steps": 2, "validate_images": 20, "report_images": 20}
    adversarial = {**attack, **own["adversarial"]} if "adversarial" in own else None
    return {
        "name": "golden",
        "seed": 5,
        "arch": {"type": "simpleCNN", "args": LAYERS[layers]},
        "data_loader": {
            "type": "DigitsDataLoader",
            "args": {"batch_size": 37, "num_batches": 3, "validation_split": 0.1},
        },
        "augmentation": own.get("augmentation", {}),
        "optimizer": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}},
        "lr_scheduler": {"type": "CosineAnnealingLR"},
        "trainer": {"epochs": 2, **own.get("trainer", {})},
        "pgd_attack": {"K": 2},
        "system": {"device": "cpu", "num_threads": 1},
        **({"adversarial": adversarial} if adversarial else {}),
    }


def names() -> list[tuple[str, str, int]]:
    """Method, layers and number of processes of every golden run."""
    return [(m, layers, n) for m in METHODS for layers in LAYERS for n in PROCESSES]


def folder_name(method: str, layers: str, processes: int) -> str:
    return f"{method}_{layers}_{processes}"


def train_all(folder: Path) -> None:
    """Train every golden run with the checkout in the current folder; errors are printed."""
    sys.path[0] = str(Path.cwd())
    # Each run below is a fork, so what is imported here is imported once.
    import experiment  # noqa: F401

    for method, layers, processes in names():
        name = folder_name(method, layers, processes)
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config(method, layers)))
        script = "train_robust.py" if "adversarial" in METHODS[method] else "train.py"
        words = [script, "-c", str(file), "--run_dir", str(folder / name)]
        port = _free_port()
        children = [_fork(words, rank, processes, port, folder) for rank in range(processes)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            print(f"{name}: exit codes {codes}\n{(folder / 'output').read_text()}", file=sys.stderr)
            sys.exit(1)


def _free_port() -> int:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _fork(words: list[str], rank: int, processes: int, port: int, folder: Path) -> int:
    """Run a script in a new process, with torchrun's variables if there are several."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({key: str(value) for key, value in torchrun.items()})
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The values of every epoch without those that measure time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def weights_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "model_last.pth", weights_only=True, map_location="cpu")["state_dict"]


def differences(first: Path, second: Path) -> list[str]:
    """The differences between two run folders, one line each."""
    found = []
    ours, theirs = log_of(first), log_of(second)
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} against {len(theirs)} epochs")
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
        for key in sorted(a.keys() | b.keys()):
            # As text, in which NaN equals NaN.
            if repr(a.get(key)) != repr(b.get(key)):
                found.append(f"epoch {number}: {key} {a.get(key)!r} against {b.get(key)!r}")
    ours, theirs = weights_of(first), weights_of(second)
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            found.append(f"weights: {key} is only in one of them")
        elif a.dtype != b.dtype or a.shape != b.shape:
            found.append(f"weights: {key} {a.dtype} {[*a.shape]} against {b.dtype} {[*b.shape]}")
        elif a.contiguous().numpy().tobytes() != b.contiguous().numpy().tobytes():
            largest = float((a.double() - b.double()).abs().max())
            found.append(f"weights: {key} by up to {largest:.3g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the golden runs of two checkouts.")
    parser.add_argument("clones", nargs="*", type=Path, metavar="CLONE", help="two checkouts")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders here")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_all(arguments.train)
        return
    if len(arguments.clones) != 2:
        parser.error("expected two checkouts: CLONE_A CLONE_B")
    for clone in arguments.clones:
        if not (clone / "train.py").is_file():
            parser.error(f"{clone} does not hold a train.py")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [(arguments.keep or Path(temporary)).absolute() / side for side in ("a", "b")]
        # These variables are read when torch is loaded.
        threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        for clone, folder in zip(arguments.clones, folders, strict=True):
            folder.mkdir(parents=True)
            environment = {**os.environ, **threads, "PYTHONPATH": str(clone.absolute())}
            words = [sys.executable, str(Path(__file__).absolute()), "--train", str(folder)]
            if subprocess.run(words, cwd=clone, env=environment).returncode:
                sys.exit(f"error: {clone} does not train")
        different = 0
        for name in (folder_name(*run) for run in names()):
            found = differences(folders[0] / name, folders[1] / name)
            verdict = "same"
            if found:
                different += 1
                verdict = f"DIFFERS, {len(found)} values; {found[0]}"
            print(f"{name:<22}", verdict)
        print(f"{len(names())} runs, {different} differ")
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
