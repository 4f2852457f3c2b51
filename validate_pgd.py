"""Robust accuracy of a checkpoint under PGD, APGD, AutoAttack or any other attack of the table.

python validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000 --steps 20 --doctor --figure examples.png
python validate_pgd.py -c config.json -s model_best.pth --norm l2 --epsilon 0.5 --limit 1000 --json l2.json
python validate_pgd.py -s model_best.pth --imports examples/mi_fgsm.py --attack mi_fgsm --set pgd_attack.decay=0.9
torchrun --nproc_per_node 2 validate_pgd.py -s saved/cifar10_pgd/20260101-120000-000000 --restarts 10
"""

from base.command_line import run_script, select_device_to_evaluate
from base.errors import ConfigError
from experiment.attack_command import ATTACKS, SIZES, attack_parser, evaluate_checkpoint


def main() -> None:
    parser = attack_parser(
        "Robust accuracy of a checkpoint under PGD or another attack.",
        tuple(flag for flag, _, _ in SIZES),
    )
    names = f"{', '.join(ATTACKS)}, or one of --imports (pgd_attack.type)"
    parser.add_argument("--attack", metavar="NAME", help=names)
    parser.add_argument(
        "--apgd", action="store_true", help="APGD, of 100 steps unless --steps says otherwise"
    )
    parser.add_argument(
        "--autoattack",
        action="store_true",
        help="standard AutoAttack (needs the package pyautoattack)",
    )
    arguments = parser.parse_args()
    select_device_to_evaluate(arguments.device)
    chosen = [name for name in ("apgd", "autoattack") if vars(arguments)[name]]
    if arguments.attack is not None:
        chosen.append(arguments.attack)
    if len(chosen) > 1:
        raise ConfigError("--attack, --apgd and --autoattack: one attack at a time")
    evaluate_checkpoint(arguments, chosen[0] if chosen else None)


if __name__ == "__main__":
    run_script(main)
