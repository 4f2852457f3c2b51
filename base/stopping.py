"""The signals that stop a long job."""

import signal

# Windows has no SIGHUP.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, a scheduler and a closed terminal ask a long job to save and exit."""
