"""Standard training from a JSON config, with validation, checkpoints and a final test.

python train.py -c configs/quickstart.json
python train.py -c configs/quickstart.json --conv conv --norm bn --seed 1 --set trainer.epochs=5
python train.py -r saved/quickstart/20260101-120000-000000
"""

from base.command_line import config_parser, run_script
from base.config.config import Config
from base.errors import ConfigError
from experiment.train_command import run_job


def main() -> None:
    run_job(config_parser("Standard training from a JSON config.").parse_args(), refuse)


def refuse(config: Config) -> None:
    """Refuse configs that the other script is for.

    Raises:
        ConfigError: naming the key.
    """
    if config.adversarial_method != "none":
        key = "adversarial.method" if config.adversarial.method else "trainer.do_adv"
        raise ConfigError(f"{key}: asks for adversarial training, train.py trains on clean images; use train_robust.py")


if __name__ == "__main__":
    run_script(main)
