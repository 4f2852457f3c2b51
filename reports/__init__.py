"""From run folders and checkpoints to tables and pictures."""
