"""Trackers of a run's values: the run log, TensorBoard, Comet."""
