"""Train adversarially from a JSON config, then attack the model on the test set.

python train_robust.py -c configs/cifar10_free.json
python train_robust.py -c configs/cifar10_pgd_l2.json --conv conv_norm --norm no
python train_robust.py -r saved/cifar10_free/20260101-120000-000000

Standard training with the same attack at the end:

python train_robust.py -c configs/cifar10.json --set adversarial.method=none
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import config_parser, print_config, run_script, training_overrides
from base.config import Config
from base.errors import ConfigError
from base.registry import TRAINERS
from experiment import resume, train


def main() -> None:
    description = "Train adversarially from a JSON config, then attack the model on the test set."
    arguments = config_parser(description).parse_args()
    overrides = training_overrides(arguments)
    # An n_gpu above 1 runs this command line again, in that many processes.
    options = {"imports": arguments.imports, "relaunch": True}
    if arguments.print_config:
        print_config(arguments, overrides)
    elif arguments.resume:
        resume(arguments.resume, overrides, config_file=arguments.config, **options)
    else:
        train(arguments.config, overrides, arguments.run_dir, check=check_config, **options)


def check_config(config: Config) -> None:
    """Raise a `ConfigError` for a config that names no training method."""
    if config.trainer.do_adv or config.adversarial.method is not None:
        return
    raise ConfigError(
        "adversarial.method: not given, and trainer.do_adv is false:"
        f" add --set adversarial.method=NAME, with one of {', '.join(TRAINERS)}"
        " (none for standard training and the attack)"
    )


if __name__ == "__main__":
    run_script(main)
