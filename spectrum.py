"""The layers of a network as the linear operators that they are: spectral norms and distances from
orthogonality.

python spectrum.py -s saved/cifar10_conv_norm/20260101-120000-000000 --figure spectrum.png --json spectrum.json
python spectrum.py -c config.json -s model_best.pth --tolerance 1e-6
python spectrum.py --model torchvision.models:resnet18 --model_args num_classes=10 -s weights.pth --data my/images
"""

from base.command_line import run_script, select_device_to_evaluate
from experiment.spectrum_command import report_spectra, spectrum_parser


def main() -> None:
    arguments = spectrum_parser().parse_args()
    select_device_to_evaluate(arguments.device)
    report_spectra(arguments)


if __name__ == "__main__":
    run_script(main)
