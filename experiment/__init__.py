"""Config -> parts -> run, and checkpoint -> model: the room that knows every other one."""

from experiment.experiment import Experiment

__all__ = ["Experiment"]
