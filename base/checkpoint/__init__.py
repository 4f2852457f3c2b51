"""Checkpoints: the file and its checksum, finding and keeping them, and resuming from them."""

from base.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from base.checkpoint.find import find_checkpoint, has_checkpoint
from base.checkpoint.weights import load_weights

__all__ = [
    "find_checkpoint",
    "has_checkpoint",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
]
