"""Spectral norms of a network's layers, and how far each layer is from orthogonal.

python spectrum.py -s saved/cifar10_conv_norm/20260101-120000-000000 --figure spectrum.png
python spectrum.py -c config.json -s model_best.pth --tolerance 1e-6 --json spectrum.json
python spectrum.py --model torchvision.models:resnet18 -s weights.pth --data my/images
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import run_script, select_device_to_evaluate
from experiment.spectrum_command import report_spectra, spectrum_parser


def main() -> None:
    arguments = spectrum_parser().parse_args()
    # CUDA reads the choice once, so it is made before anything else uses a device.
    select_device_to_evaluate(arguments.device)
    report_spectra(arguments)


if __name__ == "__main__":
    run_script(main)
