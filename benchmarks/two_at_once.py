"""Two training processes at the same time on the same cores, against one of them alone."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from types import TracebackType

import torch

from base.errors import ConfigError
from base.rooms import ROOT
from benchmarks.processes import environment
from benchmarks.rows import BenchmarkRow, Goal, Settings
from benchmarks.steps import BATCH_NORM, LAYERS, build_trainer, step_config, step_of
from benchmarks.timing import Paired

NETWORKS = {"simpleCNN": 128, "resnet18": 8}
"""Network -> batch: a narrow one, whose operations are short, and a wide one."""

SECONDS = 1.5
"""How long a process trains in each turn, at least."""

REPEATS = 3

SHARE = 0.45
ALONE, TOGETHER = "one alone", "each of two at once"
NOTE = (
    "training steps in fp32, both processes with as many threads as this one; of the two at once,"
    " the slower one; turns of one alone and of both alternate"
)


def measure(settings: Settings) -> list[BenchmarkRow]:
    """A row for each network; one network under --smoke."""
    networks = list(NETWORKS)[: settings.size(len(NETWORKS), 1)]
    return [_row(settings, network) for network in networks]


def _row(settings: Settings, network: str) -> BenchmarkRow:
    batch = settings.size(NETWORKS[network], 4)
    seconds = SECONDS if not settings.smoke else 0.0
    rates: dict[str, list[float]] = {ALONE: [], TOGETHER: []}
    with Training(settings, network, batch) as first, Training(settings, network, batch) as second:
        for number in range(settings.warmup + min(REPEATS, settings.repeats)):
            alone = _rates([first], seconds)
            together = _rates([first, second], seconds)
            if number >= settings.warmup:
                rates[ALONE] += alone
                rates[TOGETHER].append(min(together))
    pairs = Paired(rates)
    return BenchmarkRow(
        f"training step, {network}, batch {batch}, fp32",
        TOGETHER,
        pairs.ratio(TOGETHER, ALONE),
        "of the speed",
        ALONE,
        "images/s",
        ours_value=pairs.spread(TOGETHER),
        other_value=pairs.spread(ALONE),
        goal=Goal(SHARE, at_least=True),
        note=NOTE,
    )


def _rates(processes: Sequence["Training"], seconds: float) -> list[float]:
    """Images per second of each process, all of which train at the same time."""
    for process in processes:
        process.begin(seconds)
    return [process.rate() for process in processes]


class Training:
    """A new process that trains when it is told to, and waits otherwise.

    Args:
        settings: device and threads.
        network: a name of `arch.type`.
        batch: images in a minibatch.
    """

    def __init__(self, settings: Settings, network: str, batch: int) -> None:
        words = [network, str(batch), str(settings.device), str(settings.threads)]
        self.process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            [sys.executable, "-m", "benchmarks.two_at_once", *words],
            cwd=ROOT,
            env=environment(settings.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Training":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closes its standard input, so it ends.
        self.process.communicate()

    def begin(self, seconds: float) -> None:
        """Let it train for at least so many seconds, and for at least one step."""
        # Whether the process has ended is reported by `rate`.
        with suppress(BrokenPipeError):
            print(seconds, file=self.process.stdin, flush=True)

    def rate(self) -> float:
        """Wait until it has trained, and return its images per second.

        Raises:
            ConfigError: the process has ended.
        """
        for line in self.process.stdout or ():
            return float(line)
        raise ConfigError(f"two_at_once: a process ended with exit code {self.process.wait()}")


def train_on_request(network: str, batch: int, settings: Settings) -> None:
    """For each line of standard input train for that many seconds, and print the images per
    second.
    """
    size = [("data_loader.args.batch_size", str(batch)), ("arch.type", network)]
    precision = [("system.precision", "fp32")]
    trainer = build_trainer(step_config(settings, [*LAYERS[BATCH_NORM], *size, *precision]))
    step = step_of(trainer)
    for line in sys.stdin:
        steps = 0
        start = perf_counter()
        while steps == 0 or perf_counter() - start < float(line):
            step()
            steps += 1
        print(batch * steps / (perf_counter() - start), flush=True)


if __name__ == "__main__":
    network, batch, device, threads = sys.argv[1:]
    train_on_request(network, int(batch), Settings(torch.device(device), int(threads)))
