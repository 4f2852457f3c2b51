"""Where logged values go: the run log, TensorBoard, Comet."""
