"""Robust accuracy of a checkpoint under PGD, APGD, AutoAttack or any other attack of the table.

python validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000 --steps 20 --doctor
python validate_pgd.py -c config.json -s model_best.pth --norm l2 --epsilon 0.5 --limit 1000
python validate_pgd.py -s model_best.pth --imports examples/mi_fgsm.py --attack mi_fgsm
torchrun --nproc_per_node 2 validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000

--json FILE writes the report and --figure FILE draws some of the images.
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import run_script, select_device_to_evaluate
from base.registry import ATTACKS
from experiment.attack_command import SIZES, attack_network, attack_parser


def main() -> None:
    parser = attack_parser(
        "Robust accuracy of a checkpoint under PGD or another attack.",
        tuple(flag for flag, _, _ in SIZES),
    )
    attack = parser.add_mutually_exclusive_group()
    attack.add_argument(
        "--attack",
        metavar="NAME",
        help=f"{', '.join(ATTACKS)}, or one of --imports (pgd_attack.type)",
    )
    attack.add_argument(
        "--apgd",
        dest="attack",
        action="store_const",
        const="apgd",
        help="APGD, of 100 steps unless --steps says otherwise",
    )
    attack.add_argument(
        "--autoattack",
        dest="attack",
        action="store_const",
        const="autoattack",
        help="standard AutoAttack (needs the package pyautoattack)",
    )
    arguments = parser.parse_args()
    # CUDA reads the choice once, so it is made before anything else uses a device.
    select_device_to_evaluate(arguments.device)
    attack_network(arguments, arguments.attack)


if __name__ == "__main__":
    run_script(main)
