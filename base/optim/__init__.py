"""Optimizers and learning-rate schedules: built by name, checked before any data is read, resumed."""
