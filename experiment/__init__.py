"""Config -> parts -> run, and checkpoint -> model: the room that knows every other one.

Importing it fills the tables of `base.registry`, which a config is checked against.
"""

# These rooms enter their names into the tables.
import attacks as attacks
import data_loader as data_loader
import models as models
import trainer as trainer
from experiment.experiment import Experiment, RunResult, resume, train
from experiment.loading import load_model

__all__ = ["Experiment", "RunResult", "load_model", "resume", "train"]
