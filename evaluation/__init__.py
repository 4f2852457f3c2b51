"""What is measured of a model: accuracy, robust accuracy and whether it can be believed, spectra, scores of classes.

    from evaluation import doctor, robust_accuracy

The function `robust_accuracy` has the name of the module that it stands in: as an attribute of this
package it is the function; `from evaluation.robust_accuracy import ...` finds the module.
"""

from evaluation.reliability import DoctorReport, doctor
from evaluation.report import RobustnessReport
from evaluation.robust_accuracy import robust_accuracy
from evaluation.verdicts import Verdicts

__all__ = ["DoctorReport", "RobustnessReport", "Verdicts", "doctor", "robust_accuracy"]
