"""Peak memory of training steps, ConvNorm against BatchNorm, each in a process of its own."""

import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from base.allocator import keep_freed_memory
from base.base_trainer import BaseTrainer
from benchmarks.processes import python
from benchmarks.rows import BenchmarkRow, Settings, cost_row
from benchmarks.steps import (
    BATCH_NORM,
    CONV_NORM,
    LAYERS,
    build_trainer,
    precisions,
    step_config,
    step_of,
)
from benchmarks.timing import Paired

BATCH = 32
STEPS = 2
ALLOWED = 1.5
REPEATS = 2
"""Processes of each side: peaks hardly vary, and a process takes ten seconds to start."""

CLEAR_REFS = Path("/proc/self/clear_refs")
MEANING = {
    "tensors": "all tensors that are alive at the peak of a training step: weights, momentum,"
    " gradients, activations and temporary tensors; on CUDA torch.cuda.max_memory_allocated",
    "resident": "highest resident memory while training minus that before the first step: without"
    " weights, but with the allocator's reserve and the memory of MKL and oneDNN",
}


def measure(settings: Settings) -> list[BenchmarkRow]:
    """For each precision a row of tensors and, on a CPU, one of resident memory."""
    rows = []
    for precision in precisions(settings):
        used: dict[str, dict[str, list[float]]] = {
            kind: {CONV_NORM: [], BATCH_NORM: []} for kind in MEANING
        }
        for _ in range(min(REPEATS, settings.repeats)):
            for name in (CONV_NORM, BATCH_NORM):
                for kind, value in _in_new_process(settings, name, precision).items():
                    used[kind][name].append(value)
        for kind, sides in used.items():
            title = f"training step, batch {settings.size(BATCH, 4)}, {precision}: {kind}"
            if sides[CONV_NORM]:
                row = cost_row(
                    title,
                    Paired(sides),
                    CONV_NORM,
                    BATCH_NORM,
                    ALLOWED,
                    unit="MiB",
                    note=MEANING[kind],
                )
            else:
                row = BenchmarkRow(
                    title,
                    CONV_NORM,
                    other=BATCH_NORM,
                    skipped="the peak of resident memory is known on Linux only",
                )
            rows.append(row)
    return rows


def _in_new_process(settings: Settings, layers: str, precision: str) -> dict[str, float]:
    arguments = [
        str(settings.device),
        str(settings.threads),
        str(int(settings.smoke)),
        layers,
        precision,
    ]
    printed = python(["-m", "benchmarks.memory", *arguments], settings.threads)
    return json.loads(printed.splitlines()[-1])


def bytes_of_training(settings: Settings, layers: str, precision: str) -> dict[str, int]:
    """Bytes that training steps of this process need at their peak, for those kinds of `MEANING`
    that are known on this system.
    """
    size = [("data_loader.args.batch_size", str(settings.size(BATCH, 4)))]
    trainer = build_trainer(
        step_config(settings, [*LAYERS[layers], *size, *precisions(settings)[precision]]), layers
    )
    step = step_of(trainer)
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
        for _ in range(STEPS):
            step()
        return {"tensors": torch.cuda.max_memory_allocated(settings.device)}
    found = {}
    if CLEAR_REFS.exists():
        before = _resident("VmRSS")
        _reset_peak()
        for _ in range(STEPS):
            step()
        found["resident"] = _resident("VmHWM") - before
    return {**found, "tensors": _tensors_at_peak(trainer, step)}


def _tensors_at_peak(trainer: BaseTrainer, step: Callable[[], object]) -> int:
    """The tensors before a step, plus the peak of what the step allocates and frees, as torch's
    profiler counts it.
    """
    trainer.optimizer.zero_grad(set_to_none=True)
    model = trainer.model
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    alive = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        step()
    all_events = profiled.profiler.kineto_results.events()
    events = [event for event in all_events if event.name() == "[memory]"]
    # Allocations count positive and frees negative, so a running sum is the memory in use.
    events.sort(key=lambda event: event.start_ns())
    return alive + max(accumulate(event.nbytes() for event in events))


def _resident(field: str) -> int:
    """A field of `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _reset_peak() -> None:
    """Reset `VmHWM` to what is resident now."""
    # Building the network may have needed more for a moment. Linux takes 5 for this reset.
    CLEAR_REFS.write_text("5")


if __name__ == "__main__":
    # Every command does this, and the resident memory depends on it.
    keep_freed_memory()
    device, threads, smoke, *side = sys.argv[1:]
    print(
        json.dumps(
            bytes_of_training(Settings(torch.device(device), int(threads), bool(int(smoke))), *side)
        )
    )
