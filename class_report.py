"""How well a network recognizes each class of the test set, and which classes it confuses.

python class_report.py -s saved/cifar10/20260101-120000-000000 --figure confusion.png
python class_report.py -c config.json -s model_best.pth --json classes.json --csv predictions.csv
python class_report.py --model my_model.py:build -s weights.pth --data my/images
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import run_script, select_device_to_evaluate
from experiment.class_report_command import class_report_parser, report_classes


def main() -> None:
    arguments = class_report_parser().parse_args()
    # CUDA reads the choice once, so it is made before anything else uses a device.
    select_device_to_evaluate(arguments.device)
    report_classes(arguments)


if __name__ == "__main__":
    run_script(main)
