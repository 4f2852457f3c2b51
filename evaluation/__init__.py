"""What is measured of a model: accuracy, robust accuracy and whether it can be believed, spectra, scores of classes."""
