"""One thread per process, also in those that tests start: several would only get into each other's way."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is first imported
