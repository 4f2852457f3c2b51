"""Measurements of a model: accuracy, robust accuracy and its reliability, spectra, class scores.

The functions `robust_accuracy` and `class_scores` have the names of their modules: as attributes of
this package they are the functions, and `from evaluation.robust_accuracy import ...` finds the
module.
"""

from evaluation.class_scores import ClassScores, Predictions, class_scores, predict
from evaluation.reliability import DoctorReport, doctor
from evaluation.report import RobustnessReport
from evaluation.robust_accuracy import robust_accuracy
from evaluation.spectral_norm import LayerSpectrum, NetworkSpectra, layer_spectra
from evaluation.verdicts import Verdicts

__all__ = [
    "ClassScores",
    "DoctorReport",
    "LayerSpectrum",
    "NetworkSpectra",
    "Predictions",
    "RobustnessReport",
    "Verdicts",
    "class_scores",
    "doctor",
    "layer_spectra",
    "predict",
    "robust_accuracy",
]
