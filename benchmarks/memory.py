"""Peak memory of training steps, ConvNorm against BatchNorm, each measured in a process of its own."""

import json
import sys
from pathlib import Path

import torch

from benchmarks.processes import python
from benchmarks.rows import Row, Settings, cost_row
from benchmarks.steps import BATCH_NORM, CONV_NORM, LAYERS, build_trainer, step_config, step_of, systems
from benchmarks.timing import Paired

BATCH, STEPS, ALLOWED = 32, 2, 1.5
CLEAR = Path("/proc/self/clear_refs")
ON_CPU = "highest resident memory while training minus resident memory before the first step: activations, gradients, momentum"
ON_CUDA = "torch.cuda.max_memory_allocated over the training steps"


def measure(settings: Settings) -> list[Row]:
    """One row for each precision."""
    if settings.device.type != "cuda" and not CLEAR.exists():
        return [Row("training step", CONV_NORM, other=BATCH_NORM, skipped="only Linux tells the peak of resident memory")]
    rows = []
    for precision in systems(settings):
        used: dict[str, list[float]] = {CONV_NORM: [], BATCH_NORM: []}
        for _ in range(settings.repeats):
            for name, values in used.items():
                values.append(_in_new_process(settings, name, precision))
        title = f"training step, batch {settings.size(BATCH, 4)}, {precision}"
        note = ON_CUDA if settings.device.type == "cuda" else ON_CPU
        rows.append(cost_row(title, Paired(used), CONV_NORM, BATCH_NORM, ALLOWED, unit="MiB", note=note))
    return rows


def _in_new_process(settings: Settings, layers: str, precision: str) -> float:
    words = [str(settings.device), str(settings.threads), str(int(settings.smoke)), layers, precision]
    return json.loads(python(["-m", "benchmarks.memory", *words], settings.threads).splitlines()[-1])


def bytes_of_training(settings: Settings, layers: str, precision: str) -> int:
    """Bytes that the first `STEPS` training steps of this process need at their peak; see `ON_CPU` and `ON_CUDA`."""
    size = [("data_loader.args.batch_size", str(settings.size(BATCH, 4)))]
    trainer = build_trainer(step_config(settings, [*LAYERS[layers], *size, *systems(settings)[precision]]), layers)
    step = step_of(trainer)
    on_cuda = settings.device.type == "cuda"
    before = 0 if on_cuda else _resident("VmRSS")
    torch.cuda.reset_peak_memory_stats(settings.device) if on_cuda else _forget_peak()
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated(settings.device) if on_cuda else _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A field of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _forget_peak() -> None:
    """Let `VmHWM` begin anew at what is resident now: building the network may have needed more for a moment."""
    CLEAR.write_text("5")


if __name__ == "__main__":
    device, threads, smoke, *side = sys.argv[1:]
    print(bytes_of_training(Settings(torch.device(device), int(threads), bool(int(smoke))), *side))
