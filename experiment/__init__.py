"""Config -> parts -> run, and checkpoint -> model: the room that knows every other one."""

from experiment.experiment import Experiment
from experiment.loading import load_model

__all__ = ["Experiment", "load_model"]
