"""Adversarial training from a JSON config, then an attack on the test set.

python train_robust.py -c configs/cifar10_free.json
python train_robust.py -c configs/cifar10_pgd_l2.json --conv conv_norm --norm no
python train_robust.py -c configs/cifar10.json --set adversarial.method=none    # standard training, same attack
python train_robust.py -r saved/cifar10_free/20260101-120000-000000
"""

from base.command_line import config_parser, print_config, run_script, training_overrides
from base.config import Config
from base.errors import ConfigError
from base.registry import TRAINERS
from experiment import resume, train


def main() -> None:
    arguments = config_parser(
        "Adversarial training from a JSON config, then an attack on the test set."
    ).parse_args()
    overrides = training_overrides(arguments)
    own = {"imports": arguments.imports, "relaunch": True}
    if arguments.print_config:
        print_config(arguments, overrides)
    elif arguments.resume:
        resume(arguments.resume, overrides, config_file=arguments.config, **own)
    else:
        train(arguments.config, overrides, arguments.run_dir, check=refuse, **own)


def refuse(config: Config) -> None:
    """Refuse configs that the other script is for.

    Raises:
        ConfigError: naming the key.
    """
    if not config.trainer.do_adv and config.adversarial.method is None:
        raise ConfigError(
            "adversarial.method: not given, and trainer.do_adv is false: add --set adversarial.method=NAME, with one of"
            f" {', '.join(TRAINERS)} (none for standard training and the attack)"
        )


if __name__ == "__main__":
    run_script(main)
