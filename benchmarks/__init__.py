"""Side-by-side timings against named peers: `python -m benchmarks`.

The README.md of this folder has the method.
"""

import os

import base.openmp  # noqa: F401 - before torch is imported

# torch's profiler would write to the terminal. The variable is read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
