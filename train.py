"""Standard training from a JSON config, with validation, checkpoints and a final test.

python train.py -c configs/quickstart.json
python train.py -c configs/quickstart.json --conv conv --norm bn --seed 1 --set trainer.epochs=5
python train.py -r saved/quickstart/20260101-120000-000000
"""

from base.command_line import config_overrides, config_parser, read_config, run_script, select_device
from base.errors import ConfigError
from experiment import Experiment


def main() -> None:
    arguments = config_parser("Standard training from a JSON config.").parse_args()
    select_device(arguments.device)
    overrides = config_overrides(arguments)
    if arguments.resume:
        Experiment.resume(arguments.resume, arguments.config, overrides)
        return
    config = read_config(arguments, overrides)
    if config.adversarial_method != "none":
        key = "adversarial.method" if config.adversarial.method else "trainer.do_adv"
        raise ConfigError(f"{key}: asks for adversarial training, train.py trains on clean images; use train_robust.py")
    Experiment.from_config(config).run(arguments.run_dir)


if __name__ == "__main__":
    run_script(main)
