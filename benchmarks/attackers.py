"""The sides of `attack_libraries`: each attacks all images once, and remembers the robust accuracy
that came of it.

Every pass has its own random starts, as the libraries' have: with one and the same all the time,
ours would be a single draw."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks import FGSM, PGD
from attacks.attack import Attack
from attacks.threat_model import in_pixel_range
from base.device import autocast, choose_precision
from base.seeding import torch_generator
from evaluation.robust_accuracy import attack_loader
from experiment.loading import Evaluation

Correct = Callable[[Tensor, Tensor, int], Tensor]
"""`(images, labels, seed) -> whether the label survived the attack (B,)`. The libraries draw from
torch's global generator."""


@dataclass
class Attacker:
    """A side: robust accuracy of one pass over the images with a seed, kept in `accuracies`
    (fractions, one per call)."""

    accuracy: Callable[[int], float]
    accuracies: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.accuracies.append(self.accuracy(len(self.accuracies)))


def attackers(
    evaluation: Evaluation, steps: int, norm: str, epsilon: float, step_size: float
) -> dict[str, Attacker]:
    """Our sides and the libraries', with the same norm, epsilon, step and steps.

    One more of ours searches in the precision that `auto` picks here, where that is not the model's
    own. FGSM never does.

    Args:
        evaluation: model and images.
        steps: of PGD; 0 for FGSM.
        norm: `"linf"` or `"l2"`.
        epsilon: in 1/255 for l-inf, in units of the pixel range for l2.
        step_size: in the same units.
    """
    model, sizes = (
        evaluation.model,
        (in_pixel_range(epsilon, norm), in_pixel_range(step_size, norm)),
    )
    attack: Attack = PGD(*sizes, steps, norm, early_stop=True) if steps else FGSM(sizes[0], norm)
    lower = choose_precision("auto", evaluation.device)
    # as their users have it: torchattacks' l2 attack fails on gradients that are channels last
    theirs = deepcopy(model).to(memory_format=torch.contiguous_format)
    torchattacks = _torchattacks(theirs, steps, norm, *sizes)
    passes = {
        "attack_loader": _verdicts(evaluation, attack),
        **(
            {f"attack_loader, {lower}": _verdicts(evaluation, attack, lower)}
            if steps and lower != "fp32"
            else {}
        ),
        "direct call": _over_batches(evaluation, _direct(model, attack)),
        "torchattacks": _over_batches(
            evaluation,
            lambda images, labels, _: _right(theirs, torchattacks(images, labels), labels),
        ),
        "foolbox": _over_batches(evaluation, _foolbox(theirs, steps, norm, *sizes)),
    }
    return {name: Attacker(accuracy) for name, accuracy in passes.items()}


def _direct(model: nn.Module, attack: Attack) -> Correct:
    def survives(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return _right(
            model, attack(model, images, labels, generators=torch_generator(seed, "attack")), labels
        )

    return survives


def _verdicts(
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
    """FGSM under l2, which torchattacks does not have, is its PGD with one full step from the
    image."""
    import torchattacks

    if norm == "l2":
        one = {"steps": 1, "random_start": False}
        return torchattacks.PGDL2(model, epsilon, step_size, **({"steps": steps} if steps else one))
    return (
        torchattacks.PGD(model, epsilon, step_size, steps)
        if steps
        else torchattacks.FGSM(model, epsilon)
    )


def _foolbox(model: nn.Module, steps: int, norm: str, epsilon: float, step_size: float) -> Correct:
    import foolbox

    kinds = {
        ("linf", True): foolbox.attacks.LinfPGD,
        ("l2", True): foolbox.attacks.L2PGD,
        ("linf", False): foolbox.attacks.LinfFastGradientAttack,
        ("l2", False): foolbox.attacks.L2FastGradientAttack,
    }
    attack = kinds[norm, steps > 0](
        **({"abs_stepsize": step_size, "steps": steps} if steps else {})
    )
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))

    def survives(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        _, _, broken = attack(wrapped, images, labels, epsilons=epsilon)
        return ~broken

    return survives


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(dim=1) == labels


def _over_batches(evaluation: Evaluation, survives: Correct) -> Callable[[int], float]:
    def accuracy(seed: int) -> float:
        right = [survives(images, labels, seed) for images, labels in evaluation.loader]
        return float(sum(part.sum() for part in right)) / evaluation.loader.n_samples

    return accuracy
