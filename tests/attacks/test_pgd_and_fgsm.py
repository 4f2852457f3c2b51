"""PGD and FGSM: closed forms, foolbox on the same model, and the promises every attack makes."""

import foolbox
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import FGSM, PGD, ThreatModel
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.worst_case import DONE, MISSED, WorstCase
from base.seeding import torch_generator
from evaluation.attack_batch import attack_batch
from models import build_model


class Linear(nn.Module):
    """Logits `W x + b` of images of 2x2."""

    def __init__(self, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 12, generator=generator))
        self.norm = nn.BatchNorm1d(12)

    def forward(self, images):
        return self.norm(images.flatten(1)) @ self.weight.T


@pytest.fixture(scope="module")
def trained():
    """A small network that has learned to tell bright corners, and 100 images of them."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (100,), generator=generator)
    images = torch.rand(100, 3, 16, 16, generator=generator) * 0.6 + 0.2
    for index, label in enumerate(labels.tolist()):
        images[
            index,
            :,
            8 * (label // 2) : 8 * (label // 2) + 8,
            8 * (label % 2) : 8 * (label % 2) + 8,
        ] += 0.045
    torch.manual_seed(0)
    model = build_model({"type": "simpleCNN", "args": {"num_classes": 4}}, (0.5,) * 3, (0.25,) * 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(60):
        part = slice(50 * (step % 2), 50 * (step % 2) + 50)
        optimizer.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    model.eval()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
    return model, images, labels


def images_and_labels(n=5, classes=3, size=2):
    generator = torch.Generator().manual_seed(7)
    images = 0.3 + 0.4 * torch.rand(n, 3, size, size, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_of_two_classes_both_reach_the_exact_worst_point(targeted):
    model, (images, labels) = Linear(2).eval(), images_and_labels(classes=2)
    # Raises class 1 against class 0
    towards = (model.weight[1] - model.weight[0]).detach().reshape(3, 2, 2)
    sign = torch.where((labels == 0) != targeted, 1.0, -1.0).reshape(-1, 1, 1, 1)
    direction = sign * towards
    linf = (images + 0.05 * direction.sign()).clamp(0, 1)
    for attack in (FGSM(0.05, targeted=targeted), PGD(0.05, 0.02, 20, targeted=targeted)):
        assert torch.equal(attack(model, images, labels), linf)
    l2 = images + 0.1 * direction / direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(FGSM(0.1, "l2", targeted=targeted)(model, images, labels), l2)
    torch.testing.assert_close(
        PGD(0.1, 0.05, 60, "l2", targeted=targeted)(model, images, labels), l2, rtol=1e-4, atol=1e-4
    )


def test_fgsm_is_pgd_with_one_full_step_and_no_random_start(trained):
    model, images, labels = trained
    same = PGD(2 / 255, 2 / 255, 1, random_start=False)
    assert torch.equal(FGSM(2 / 255)(model, images, labels), same(model, images, labels))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 2 / 255), ("l2", 0.25)])
def test_robust_accuracy_equals_foolboxs(trained, norm, epsilon):
    model, images, labels = trained
    peer = foolbox.PyTorchModel(model, bounds=(0, 1))
    classes = {
        "linf": (foolbox.attacks.LinfFastGradientAttack, foolbox.attacks.LinfPGD),
        "l2": (foolbox.attacks.L2FastGradientAttack, foolbox.attacks.L2PGD),
    }[norm]
    theirs = [
        classes[0](random_start=False)(peer, images, labels, epsilons=epsilon)[2],
        classes[1](abs_stepsize=epsilon / 4, steps=10)(peer, images, labels, epsilons=epsilon)[2],
    ]
    ours = []
    for attack in (FGSM(epsilon, norm), PGD(epsilon, epsilon / 4, 10, norm)):
        verdicts, _ = attack_batch(
            model, images, labels, attack, positions=torch.arange(100), seed=0
        )
        ours.append(100 - int(verdicts.robust_top1.sum()))
    theirs = [int(broken.sum()) for broken in theirs]
    assert 10 < theirs[0] < 95, "an attack worth comparing"
    assert abs(ours[0] - theirs[0]) <= 1
    # Its l2 starts lie at the ball's surface: it finds less
    assert -2 <= ours[1] - theirs[1] <= (2 if norm == "linf" else 6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_image_stays_in_the_ball_and_more_steps_are_stronger(trained, norm):
    model, images, labels = trained
    epsilon = 2 / 255 if norm == "linf" else 0.25
    threat, losses = ThreatModel(norm, epsilon), []
    for steps in (1, 3, 10):
        found = PGD(epsilon, epsilon / 4, steps, norm)(model, images, labels)
        assert threat.distance(found, images).max() <= epsilon * (1 + 1e-5)
        assert found.min() >= 0
        assert found.max() <= 1
        losses.append(float(F.cross_entropy(model(found), labels).detach()))
    assert losses[0] < losses[1] < losses[2]


def test_l2_starts_have_uniform_lengths_and_directions():
    images = torch.full((4000, 1, 2, 2), 0.5)
    threat = ThreatModel("l2", 0.25)
    change = threat.random_start(images, torch.Generator().manual_seed(0)) - images
    length = change.flatten(1).norm(dim=1) / 0.25
    for r in (0.25, 0.5, 0.95):
        assert float((length <= r).float().mean()) == pytest.approx(r, abs=0.025)
    direction = change.flatten(1) / change.flatten(1).norm(dim=1, keepdim=True)
    assert direction.mean(dim=0).abs().max() < 0.03
    torch.testing.assert_close(direction.T @ direction / 4000, torch.eye(4) / 4, rtol=0, atol=0.02)


def test_zero_tiny_and_nan_gradients_move_as_they_should():
    gradient = torch.zeros(3, 1, 2, 2)
    gradient[1, 0, 0, 0], gradient[2, 0, 0, 0] = 1e-35, float("nan")
    for norm in ("linf", "l2"):
        step = ThreatModel(norm, 1.0).direction(gradient)
        assert torch.equal(step.flatten(1).norm(dim=1), torch.tensor([0.0, 1.0, 0.0]))


def test_attacking_leaves_modes_flags_and_gradients_as_they_were(trained):
    model, images, labels = trained
    model.train()
    model.features[1].eval()
    model.classifier.bias.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        PGD(2 / 255, 1 / 255, 2, restarts=2)(model, images[:4], labels[:4])
    assert model.training
    assert not model.features[1].training
    assert not model.classifier.bias.requires_grad
    assert model.classifier.weight.requires_grad
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.classifier.weight.grad = None
    model.classifier.bias.requires_grad_(True)
    model.eval()


def test_restarts_keep_the_worst_point_of_every_image(trained):
    model, images, labels = trained
    images, labels = images[:32], labels[:32]
    generators = [torch_generator(0, "test", index) for index in range(32)]
    one = PGD(2 / 255, 0.5 / 255, 3)
    many = PGD(2 / 255, 0.5 / 255, 3, restarts=4)
    logits = model(many(model, images, labels, generators=generators)).detach()
    worst = F.cross_entropy(logits, labels, reduction="none")
    resisting = wrongness(logits, labels) == 0
    assert 0 < int(resisting.sum()) < 32
    generators = [torch_generator(0, "test", index) for index in range(32)]
    # A generator continues where the last restart left it
    for _ in range(4):
        logits = model(one(model, images, labels, generators=generators)).detach()
        assert (wrongness(logits, labels)[resisting] == 0).all()
        losses = F.cross_entropy(logits, labels, reduction="none")
        assert (losses[resisting] <= worst[resisting] + 1e-5).all()


def test_early_stop_leaves_misclassified_images_alone(trained):
    model, images, labels = trained
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = PGD(2 / 255, 0.5 / 255, 10, early_stop=True)(model, images, labels)
    handle.remove()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] == 100
    plain = wrongness(model(PGD(2 / 255, 0.5 / 255, 10)(model, images, labels)), labels) > 0
    early = wrongness(model(found), labels) > 0
    assert (early >= plain).all(), "the last point counts, too"
    rank_two = wrongness(
        model(PGD(8 / 255, 2 / 255, 10, early_stop=2)(model, images, labels)), labels, 2
    )
    assert (rank_two == 2).sum() > (wrongness(model(found), labels, 2) == 2).sum()


def test_a_confident_attack_continues_until_there_is_a_margin(trained):
    model, images, labels = trained

    def margins(attack):
        logits = model(attack(model, images, labels))
        own = logits.gather(1, labels[:, None]).squeeze(1)
        return (logits.amax(1) - own) / logits.abs().amax(1)

    attack = PGD(4 / 255, 1 / 255, 10, early_stop=True)
    sure = margins(attack.confident(0.1))
    plain = margins(attack)
    assert ((plain > 0) & (plain < 0.1)).sum() > 2 * ((sure > 0) & (sure < 0.1)).sum()
    assert ((sure > 0) >= (plain > 0)).all()
    assert attack.confidence == 0, "the attack itself stays as it was"
    logits = torch.tensor([[5.0, 4.95, 0.0], [5.0, 4.85, 0.0], [4.9, 5.0, 0.0]])
    assert attack.confident(0.02).reached(logits, torch.tensor([1, 1, 1])).tolist() == [0, 2, 0]


def test_losses_against_their_definitions():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.5, 0.25, 1.0, 4.0]])
    labels = torch.tensor([0, 2])
    assert ATTACK_LOSSES["margin"](logits, labels).tolist() == [-1.0, 3.0]
    assert ATTACK_LOSSES["dlr"](logits, labels).tolist() == pytest.approx([-1 / 2, 3 / 3.5])
    expected = torch.logsumexp(logits, 1) - logits.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(ATTACK_LOSSES["ce"](logits, labels), expected)
    assert wrongness(logits, labels).tolist() == [0, 2]
    assert wrongness(logits, labels, 2).tolist() == [0, 1]
    ties = torch.zeros(4, 4)
    assert wrongness(ties, torch.arange(4)).tolist() == [0, 2, 2, 2], (
        "of equal logits the first is the larger"
    )
    assert wrongness(ties, torch.arange(4), 2).tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="needs at least 3 classes, the model has 2"):
        ATTACK_LOSSES["dlr"](logits[:, :2], labels[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(-1, 1, 1), "epsilon: expected at least 0, not -1"),
        (lambda: PGD(1, 1, 1, "l1"), "norm 'l1' is not one of: linf, l2"),
        (lambda: PGD(1, float("nan"), 1), "step_size: expected a finite number, not nan"),
        (lambda: PGD(1, float("inf"), 1), "step_size: expected a finite number, not inf"),
        (lambda: PGD(8, 2, 10), "units of the pixel range, at most 1, not 8; 8/255?"),
        (lambda: PGD(8 / 255, 2, 10), "step_size: l-inf sizes .*; 2/255?"),
        (lambda: FGSM(1.5), "epsilon: l-inf sizes .* at most 1, not 1.5"),
        (lambda: ThreatModel("linf", 16), "not 16; 16/255?"),
        (lambda: ThreatModel("linf", 300), "at most 1, not 300$"),
        (lambda: PGD(True, 1, 1), "epsilon: expected a finite number, not True"),
        (lambda: PGD("0.03", 1, 1), "epsilon: expected a finite number, not '0.03'"),
        (lambda: PGD(1, 1, 0), "steps: expected an integer of at least 1, not 0"),
        (lambda: PGD(1, 1, 1.5), "steps: expected an integer of at least 1, not 1.5"),
        (lambda: PGD(1, 1, True), "steps: expected an integer of at least 1, not True"),
        (lambda: PGD(1, 1, float("nan")), "steps: expected an integer of at least 1, not nan"),
        (lambda: PGD(1, 1, 1, restarts=2.0), "restarts: expected an integer .*, not 2.0"),
        (lambda: PGD(1, 1, 1, early_stop=-1), "early_stop: .* at least 0, not -1"),
        (lambda: PGD(1, 1, 1, seed=0.5), "seed: expected an integer of at least 0, not 0.5"),
        (lambda: FGSM(1, loss="cw"), "loss 'cw' is not one of: ce, margin, dlr"),
        (
            lambda: PGD(1, 1, 1, targeted=True, early_stop=5),
            "early_stop 5: a targeted attack stops at the target",
        ),
        (
            lambda: PGD(1, 1, 1, restarts=2, random_start=False),
            "restarts 2: without random_start, all restarts are the same",
        ),
        (
            lambda: FGSM(1)(
                Linear(),
                torch.zeros(2, 3, 2, 2),
                torch.tensor([0, 1]),
                generators=[torch.Generator()],
            ),
            "generators: expected one, or 2, one per image, not 1",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_images_give_no_images():
    assert PGD(1, 1, 1)(
        Linear(), torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64)
    ).shape == (0, 3, 2, 2)


def test_confidence_is_a_fraction_of_the_largest_logit_of_either_sign():
    attack = PGD(4 / 255, 1 / 255, 10, early_stop=True).confident(0.02)
    # The largest is 9 or 10: the label has to fall short by 0.18 or 0.2
    logits = torch.tensor([[-5.0, -5.1, -9.0], [-5.0, -5.2, -9.0], [5.0, 4.9, -10.0]])
    assert attack.reached(logits, torch.tensor([1, 1, 1])).tolist() == [0, 2, 0]


def test_a_misclassified_point_is_worse_than_any_that_is_classified_correctly():
    worst = WorstCase(torch.zeros(1, 1, 1, 1))
    found = ((1.0, MISSED), (0.5, DONE), (9.0, MISSED), (0.4, DONE), (0.6, DONE))
    kept = []
    for loss, reached in found:
        point = torch.full((1, 1, 1, 1), loss)
        worst.update(torch.arange(1), point, torch.tensor([loss]), torch.tensor([reached]))
        kept.append((round(float(worst.points), 3), int(worst.reached)))
    assert kept == [(1.0, MISSED), (0.5, DONE), (0.5, DONE), (0.5, DONE), (0.6, DONE)]
