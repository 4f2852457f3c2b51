"""How far apart images lie in the last features of untrained networks, and how far an attack moves
them.

    python -m benchmarks.initial_features configs/small_wide_resnet.json 0 1 2 3

Prints two numbers for each seed (of weights, data split and order), from the pooled features
`(B, D)` of 60 training images: the share of their mean square that is variance between images, and
the mean square distance by which the config's training attack moves them, over that variance.
"""

import argparse
from pathlib import Path

import torch

from base.config import Override, load_config
from base.machine import set_machine
from experiment import Experiment

IMAGES = 60
NETWORKS = {
    "BatchNorm": [],
    "GroupNorm": [("arch.args.norm_layer_type", "gn")],
    "GroupNorm, He": [("arch.args.norm_layer_type", "gn"), ("arch.args.init", "he")],
    "GroupNorm, branches at zero": [
        ("arch.args.norm_layer_type", "gn"),
        ("arch.args.zero_init_residual", "true"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the features of untrained networks.")
    parser.add_argument("config", help="config file whose network, data and attack are used")
    parser.add_argument("seeds", nargs="*", default=["0"], help="seeds, 0 by default")
    arguments = parser.parse_args()
    for name, overrides in NETWORKS.items():
        pairs = [
            share_and_movement(arguments.config, [*overrides, ("seed", seed)])
            for seed in arguments.seeds
        ]
        shares = ", ".join(f"{share:.1%}" for share, _ in pairs)
        movements = ", ".join(f"{movement:.2f}" for _, movement in pairs)
        print(
            f"{name}: {shares} of the mean square is variance between images; the attack moves the"
            f" features by {movements} times that variance"
        )


def share_and_movement(file: str, overrides: list[Override]) -> tuple[float, float]:
    """Both numbers, for one config and one seed."""
    config = load_config(file, [*overrides, ("data_loader.args.batch_size", str(IMAGES))])
    set_machine(config.system)
    experiment = Experiment.from_config(config)
    trainer = experiment.build_trainer(Path())
    loader = experiment.train_loader
    model = experiment.model.train()
    loader.set_epoch(1)
    images, labels = next(iter(loader))
    generator = torch.Generator().manual_seed(0)
    attacked = trainer.attack.perturb(model, images, labels, generator).detach()
    features: list[torch.Tensor] = []
    *_, last = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    last.register_forward_hook(lambda module, inputs, output: features.append(inputs[0].detach()))
    with torch.no_grad():
        model(images)
        model(attacked)
    clean, moved = features
    variance = (clean - clean.mean(dim=0)).square().sum()
    share = variance / clean.square().sum()
    movement = (moved - clean).square().sum() / variance
    return float(share), float(movement)


if __name__ == "__main__":
    main()
