"""The sides of `attack_libraries`: each attacks all images once and remembers the robust accuracy.

Every pass of our sides has its own random starts, as every pass of the libraries has. With the same
starts every time, all our passes would be a single draw.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attacks import FGSM, PGD
from attacks.attack import Attack
from attacks.threat_model import in_pixel_range
from base.precision import autocast, choose_precision
from base.seeding import torch_generator
from evaluation.robust_accuracy import attack_loader
from experiment.evaluation import Evaluation

LOADER, LOADER_BF16, DIRECT = "attack_loader", "attack_loader, bf16", "direct call"
DIRECT_NCHW = "direct call, NCHW"
LIBRARIES = ("torchattacks", "foolbox")

Survives = Callable[[Tensor, Tensor, int], Tensor]
"""`(images, labels, seed) -> whether each prediction survived the attack (B,)`. The libraries draw
from torch's global generator instead of the seed's.
"""


@dataclass
class Attacker:
    """A side of the comparison.

    Attributes:
        accuracy: attacks all images once with a seed, and returns the robust accuracy in [0, 1].
        accuracies: the robust accuracies of all calls so far.
    """

    accuracy: Callable[[int], float]
    accuracies: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.accuracies.append(self.accuracy(len(self.accuracies)))


def attackers(
    evaluation: Evaluation,
    steps: int,
    norm: str,
    epsilon: float,
    step_size: float,
    nchw_too: bool = False,
) -> dict[str, Attacker]:
    """Our sides and the libraries, with the same norm, epsilon, step size and steps.

    `attack_loader` stops for an image once it is misclassified. `direct call` takes all steps for
    every image, as the libraries do. One more side of PGD searches in bf16, where `auto` picks
    that.

    Args:
        evaluation: model and images.
        steps: PGD's steps; 0 for FGSM.
        norm: `"linf"` or `"l2"`.
        epsilon: in 1/255 for l-inf, in units of the pixel range for l2.
        step_size: in the same units.
        nchw_too: one more side is the direct call on the network in the libraries' memory format.
    """
    model = evaluation.model
    sizes = (in_pixel_range(epsilon, norm), in_pixel_range(step_size, norm))
    all_steps = _attack(steps, norm, *sizes)
    attack = replace(all_steps, early_stop=steps > 0)
    # The libraries attack the network in NCHW, as their users have it: torchattacks' l2 attack
    # fails on gradients that are channels last.
    nchw = deepcopy(model).to(memory_format=torch.contiguous_format)
    library = _torchattacks(nchw, steps, norm, *sizes)

    def survives_torchattacks(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return _is_right(nchw, library(images, labels), labels)

    passes = {LOADER: _attack_loader(evaluation, attack)}
    if steps and choose_precision("auto", evaluation.device) == "bf16":
        passes[LOADER_BF16] = _attack_loader(evaluation, attack, "bf16")
    passes[DIRECT] = _over_batches(evaluation, _direct(model, all_steps))
    if nchw_too:
        passes[DIRECT_NCHW] = _over_batches(evaluation, _direct(nchw, all_steps))
    passes["torchattacks"] = _over_batches(evaluation, survives_torchattacks)
    passes["foolbox"] = _over_batches(evaluation, _foolbox(nchw, steps, norm, *sizes))
    return {name: Attacker(accuracy) for name, accuracy in passes.items()}


def direct_flops(
    evaluation: Evaluation, steps: int, norm: str, epsilon: float, step_size: float
) -> int:
    """Multiplications and additions of products and convolutions in one call of `direct call`,
    for the same arguments as those of `attackers`."""
    sizes = (in_pixel_range(epsilon, norm), in_pixel_range(step_size, norm))
    survives = _direct(evaluation.model, _attack(steps, norm, *sizes))
    images, labels = next(iter(evaluation.loader))
    with FlopCounterMode(display=False) as counter:
        survives(images[:1], labels[:1], 0)
    return counter.get_total_flops() * evaluation.loader.n_samples


def _attack(steps: int, norm: str, epsilon: float, step_size: float) -> PGD:
    if steps:
        return PGD(epsilon, step_size, steps, norm)
    return FGSM(epsilon, norm)


def _direct(model: nn.Module, attack: Attack) -> Survives:
    def survives(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch_generator(seed, "attack")
        return _is_right(model, attack(model, images, labels, generators=generator), labels)

    return survives


def _attack_loader(
    evaluation: Evaluation, attack: Attack, precision: str = "fp32"
) -> Callable[[int], float]:
    def accuracy(seed: int) -> float:
        context = partial(autocast, evaluation.device, precision)
        verdicts = attack_loader(
            evaluation.model, evaluation.loader, attack, seed=seed, autocast=context
        )
        return verdicts.accuracy("robust_top1")

    return accuracy


def _torchattacks(model: nn.Module, steps: int, norm: str, epsilon: float, step_size: float) -> Any:
    import torchattacks

    if norm == "l2":
        if steps:
            return torchattacks.PGDL2(model, epsilon, step_size, steps=steps)
        # torchattacks has no FGSM for l2. One full step of its PGD from the image is the same.
        return torchattacks.PGDL2(model, epsilon, step_size, steps=1, random_start=False)
    if steps:
        return torchattacks.PGD(model, epsilon, step_size, steps)
    return torchattacks.FGSM(model, epsilon)


def _foolbox(model: nn.Module, steps: int, norm: str, epsilon: float, step_size: float) -> Survives:
    import foolbox

    kinds = {
        ("linf", True): foolbox.attacks.LinfPGD,
        ("l2", True): foolbox.attacks.L2PGD,
        ("linf", False): foolbox.attacks.LinfFastGradientAttack,
        ("l2", False): foolbox.attacks.L2FastGradientAttack,
    }
    options = {}
    if steps:
        options = {"abs_stepsize": step_size, "steps": steps}
    attack = kinds[norm, steps > 0](**options)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))

    def survives(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        _, _, broken = attack(wrapped, images, labels, epsilons=epsilon)
        return ~broken

    return survives


def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(dim=1) == labels


def _over_batches(evaluation: Evaluation, survives: Survives) -> Callable[[int], float]:
    def accuracy(seed: int) -> float:
        right = [survives(images, labels, seed) for images, labels in evaluation.loader]
        return float(sum(part.sum() for part in right)) / evaluation.loader.n_samples

    return accuracy
