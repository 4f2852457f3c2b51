"""Peak memory of training steps, ConvNorm against BatchNorm, each measured in a process of its
own."""

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
from benchmarks.rows import Row, Settings, cost_row
from benchmarks.steps import (
    BATCH_NORM,
    CONV_NORM,
    LAYERS,
    build_trainer,
    step_config,
    step_of,
    systems,
)
from benchmarks.timing import Paired

BATCH, STEPS, ALLOWED = 32, 2, 1.5
REPEATS = 2
"""Processes of each side: peaks hardly vary, and a process takes ten seconds to start."""
CLEAR = Path("/proc/self/clear_refs")
MEANING = {
    "tensors": "all tensors that are alive at the peak of a training step: weights, momentum, gradients, activations and what "
    "is needed for a moment; on CUDA torch.cuda.max_memory_allocated",
    "resident": "highest resident memory while training minus that before the first step: no weights, but what the allocator "
    "keeps in reserve and what MKL and oneDNN take for themselves",
}


def measure(settings: Settings) -> list[Row]:
    """For each precision a row of tensors and, on a CPU, one of resident memory."""
    rows = []
    for precision in systems(settings):
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
                row = Row(
                    title,
                    CONV_NORM,
                    other=BATCH_NORM,
                    skipped="only Linux tells the peak of a CPU's resident memory",
                )
            rows.append(row)
    return rows


def _in_new_process(settings: Settings, layers: str, precision: str) -> dict[str, float]:
    words = [
        str(settings.device),
        str(settings.threads),
        str(int(settings.smoke)),
        layers,
        precision,
    ]
    return json.loads(
        python(["-m", "benchmarks.memory", *words], settings.threads).splitlines()[-1]
    )


def bytes_of_training(settings: Settings, layers: str, precision: str) -> dict[str, int]:
    """Bytes that training steps of this process need at their peak, by the kinds of `MEANING` that
    can be known here."""
    size = [("data_loader.args.batch_size", str(settings.size(BATCH, 4)))]
    trainer = build_trainer(
        step_config(settings, [*LAYERS[layers], *size, *systems(settings)[precision]]), layers
    )
    step = step_of(trainer)
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
        for _ in range(STEPS):
            step()
        return {"tensors": torch.cuda.max_memory_allocated(settings.device)}
    found = {}
    if CLEAR.exists():
        before = _resident("VmRSS")
        _forget_peak()
        for _ in range(STEPS):
            step()
        found["resident"] = _resident("VmHWM") - before
    return {**found, "tensors": _tensors_at_peak(trainer, step)}


def _tensors_at_peak(trainer: BaseTrainer, step: Callable[[], object]) -> int:
    """What was there before a step, and the peak of what the step allocates and frees, as torch's
    profiler counts it."""
    trainer.optimizer.zero_grad(set_to_none=True)
    model, state = trainer.model, trainer.optimizer.state.values()
    moments = [
        value for values in state for value in values.values() if isinstance(value, torch.Tensor)
    ]
    alive = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return alive + max(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )


def _resident(field: str) -> int:
    """A field of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _forget_peak() -> None:
    """Let `VmHWM` begin anew at what is resident now: building the network may have needed more for
    a moment."""
    CLEAR.write_text("5")


if __name__ == "__main__":
    # As every command does: the resident memory depends on it.
    keep_freed_memory()
    device, threads, smoke, *side = sys.argv[1:]
    print(
        json.dumps(
            bytes_of_training(Settings(torch.device(device), int(threads), bool(int(smoke))), *side)
        )
    )
