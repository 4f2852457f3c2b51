"""The checkpoint file, its checksum, which checkpoints are kept, and what a resume restores."""
