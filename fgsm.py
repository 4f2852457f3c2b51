"""Robust accuracy of a checkpoint under FGSM.

python fgsm.py -s saved/cifar10_free/20260101-120000-000000
python fgsm.py -c config.json -s model_best.pth --epsilon 4 --limit 1000 --json fgsm.json
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import run_script, select_device_to_evaluate
from experiment.attack_command import attack_network, attack_parser


def main() -> None:
    parser = attack_parser(
        "Robust accuracy of a checkpoint under FGSM.", ("--norm", "--epsilon", "--loss")
    )
    arguments = parser.parse_args()
    # CUDA reads the choice once, so it is made before anything else uses a device.
    select_device_to_evaluate(arguments.device)
    attack_network(arguments, "fgsm")


if __name__ == "__main__":
    run_script(main)
