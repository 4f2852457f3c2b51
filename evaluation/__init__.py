"""What is measured of a model: accuracy, robust accuracy and whether it can be believed, spectra, scores of classes."""

from evaluation.class_scores import ClassScores, Predictions, class_scores, predict
from evaluation.spectral_norm import LayerSpectrum, NetworkSpectra, layer_spectra

__all__ = [
    "ClassScores",
    "LayerSpectrum",
    "NetworkSpectra",
    "Predictions",
    "class_scores",
    "layer_spectra",
    "predict",
]
