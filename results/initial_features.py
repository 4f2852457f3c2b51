"""How far apart images lie in the last features of networks that have not been trained, and how far PGD moves them.

python results/initial_features.py configs/small_wide_resnet.json

Prints, of the pooled features `(B, D)` of 60 training images: the share of their mean square that is variance between images,
and the mean square distance that the config's training attack moves them, over that variance.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from assembly import build_data_loader, build_experiment_model
from attacks import from_config
from base.config_files import load_config

IMAGES = 60
NETWORKS = {
    "BatchNorm": [],
    "GroupNorm": [("arch.args.norm_layer_type", "gn")],
    "GroupNorm, He": [("arch.args.norm_layer_type", "gn"), ("arch.args.init", "he")],
    "GroupNorm, branches at zero": [("arch.args.norm_layer_type", "gn"), ("arch.args.zero_init_residual", "true")],
}


def main() -> None:
    for name, overrides in NETWORKS.items():
        config = load_config(sys.argv[1], [*overrides, ("data_loader.args.batch_size", str(IMAGES))])
        loader = build_data_loader(config, torch.device("cpu"))
        loader.set_epoch(1)
        images, labels = next(iter(loader))
        model = build_experiment_model(config, loader, torch.device("cpu")).train()
        seen = []
        last = next(module for module in reversed(list(model.modules())) if isinstance(module, torch.nn.Linear))
        last.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0].detach()))
        attack = from_config.training_attack(config)
        attacked = attack.perturb(model, images, labels, torch.Generator().manual_seed(0)).detach()
        seen.clear()
        with torch.no_grad():
            model(images)
            model(attacked)
        clean, moved = seen
        variance = (clean - clean.mean(dim=0)).square().sum()
        share, distance = float(variance / clean.square().sum()), float((moved - clean).square().sum() / variance)
        print(f"{name}: {share:.1%} lie between images, the attack moves them by {distance:.2f} of that")


if __name__ == "__main__":
    main()
