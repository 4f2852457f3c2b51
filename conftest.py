"""One thread per process, also in those that tests start: several would only get into each other's way. And signals as in a
terminal: who starts the tests in the background, or with nohup, has them ignored, and processes inherit that."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is first imported
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, *((signal.SIGHUP, signal.SIGQUIT) if hasattr(signal, "SIGHUP") else ())):
    signal.signal(number, signal.SIG_DFL)
