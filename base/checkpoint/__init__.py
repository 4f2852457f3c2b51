"""The checkpoint file, its checksum, which checkpoints are kept, and what a resume restores."""

from base.checkpoint.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)

__all__ = [
    "find_checkpoint",
    "has_checkpoint",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
]
