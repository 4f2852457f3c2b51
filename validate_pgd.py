"""Robust accuracy of a checkpoint under PGD, APGD or AutoAttack.

python validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000 --steps 20 --doctor --figure examples.png
python validate_pgd.py -c config.json -s model_best.pth --norm l2 --epsilon 0.5 --limit 1000 --json l2.json
torchrun --nproc_per_node 2 validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000 --restarts 10
"""

from base.command_line import run_script, select_device_to_evaluate
from base.errors import ConfigError
from experiment.attack_command import SIZES, attack_parser, evaluate_checkpoint


def main() -> None:
    parser = attack_parser("Robust accuracy of a checkpoint under PGD.", tuple(flag for flag, _, _ in SIZES))
    parser.add_argument("--apgd", action="store_true", help="APGD, of 100 steps unless --steps says otherwise")
    parser.add_argument("--autoattack", action="store_true", help="standard AutoAttack (needs the package pyautoattack)")
    arguments = parser.parse_args()
    select_device_to_evaluate(arguments.device)
    if arguments.autoattack and arguments.apgd:
        raise ConfigError("--autoattack and --apgd: one attack at a time")
    if arguments.apgd and vars(arguments)["pgd_attack.K"] is None:
        vars(arguments)["pgd_attack.K"] = "100"
    evaluate_checkpoint(arguments, "autoattack" if arguments.autoattack else "apgd" if arguments.apgd else "pgd")


if __name__ == "__main__":
    run_script(main)
