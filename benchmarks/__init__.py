"""Side-by-side timings against named peers: `python -m benchmarks`; see README.md of this folder
for the method."""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # torch's profiler otherwise writes to the terminal; read when torch is imported
