"""Train on clean images from a JSON config, with validation, checkpoints and a final test.

python train.py -c configs/quickstart.json
python train.py -c configs/quickstart.json --conv conv --norm bn --seed 1 --set trainer.epochs=5
python train.py -r saved/quickstart/20260101-120000-000000
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import config_parser, print_config, run_script, training_overrides
from base.config import Config
from base.errors import ConfigError
from experiment import resume, train


def main() -> None:
    arguments = config_parser("Train on clean images from a JSON config.").parse_args()
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
    """Raise a `ConfigError` for a config that train_robust.py is for."""
    if not config.attacks_while_training:
        return
    key = "adversarial.method" if config.adversarial.method else "trainer.do_adv"
    raise ConfigError(
        f"{key}: asks for adversarial training, but train.py trains on clean images:"
        " use train_robust.py"
    )


if __name__ == "__main__":
    run_script(main)
