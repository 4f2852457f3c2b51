"""Two processes of one job, as torchrun would start them."""

import os
import subprocess
import sys
from pathlib import Path
from socket import socket

from tiny_runs import Fork

ROOT = Path(__file__).parents[3]


def start_two(script, *words):
    """Start a script as two processes; return them by rank, with pipes for stdout and stderr."""
    with socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return [
        Fork(
            [sys.executable, str(script), *map(str, words)],
            env={**os.environ, **shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def ended(processes):
    """Wait for processes; return their exit codes and what they wrote to stderr."""
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], errors
