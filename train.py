"""Standard training from a JSON config, with validation, checkpoints and a final test.

    python train.py -c configs/quickstart.json
    python train.py -c configs/quickstart.json --conv conv --norm bn --seed 1 --set trainer.epochs=5
    python train.py -r saved/quickstart/20260101-120000-000000
"""

from base.command_line import config_overrides, config_parser, run_script, select_device
from base.config_files import load_config
from base.errors import ConfigError
from experiment import Experiment


def main() -> None:
    arguments = config_parser("Standard training from a JSON config.").parse_args()
    select_device(arguments.device)
    overrides = config_overrides(arguments)
    if arguments.resume:
        if arguments.run_dir:
            raise ConfigError("--run_dir: a resumed run stays in its own folder")
        Experiment.resume(arguments.resume, arguments.config, overrides)
        return
    if not arguments.config:
        raise ConfigError("-c CONFIG or -r CHECKPOINT is required (see train.py --help)")
    config = load_config(arguments.config, overrides)
    if config.trainer.do_adv:
        raise ConfigError("trainer.do_adv: true asks for adversarial training, train.py trains on clean images; set it false")
    Experiment.from_config(config).run(arguments.run_dir)


if __name__ == "__main__":
    run_script(main)
