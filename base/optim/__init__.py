"""Optimizers and learning-rate schedules: built by name, checked before data is read, resumed."""

from base.optim.check import check_optimization
from base.optim.optimizers import OPTIMIZERS, build_optimizer, load_optimizer
from base.optim.schedules import SCHEDULERS, Schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULERS",
    "Schedule",
    "build_optimizer",
    "check_optimization",
    "load_optimizer",
]
