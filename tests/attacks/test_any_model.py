"""Attacks keep their promises for every model and all images: functions, models that write into
their input or answer NaN, answers that are not logits, labels that are not classes, tensors from
inference mode."""

from functools import partial

import pytest
import torch
from torch import nn

from attacks import APGD, FGSM, PGD, Square
from attacks.losses import wrongness
from base.seeding import torch_generator
from evaluation import robust_accuracy
from evaluation.attack_batch import attack_batch
from evaluation.checks import quick_checks
from evaluation.verdicts import NONE

CLASSES = 6
ATTACKS = {
    "fgsm": lambda epsilon, norm: FGSM(epsilon, norm),
    "fgsm early": lambda epsilon, norm: FGSM(epsilon, norm, early_stop=True),
    "pgd": lambda epsilon, norm: PGD(epsilon, epsilon / 3, 4, norm),
    "pgd restarts": lambda epsilon, norm: PGD(
        epsilon, epsilon / 3, 3, norm, restarts=2, early_stop=True
    ),
    "apgd": lambda epsilon, norm: APGD(epsilon, 5, norm),
    "square": lambda epsilon, norm: Square(epsilon, 15, norm),
}
EPSILON = {"linf": 0.04, "l2": 0.7}
CASES = [(name, norm) for name in ATTACKS for norm in EPSILON]


class InPlace(nn.Module):
    """Normalizes its input in place before a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.sub_(0.4).div_(0.3))


def exported(model):
    """The model as a module that has no modes, and raises an error if it is asked for one."""
    shapes = {0: torch.export.Dim("batch")}
    return torch.export.export(model, (torch.rand(7, 1, 11, 9),), dynamic_shapes=(shapes,)).module()


def compiled_and_frozen(model):
    return torch.jit.freeze(torch.jit.script(model))


class OutOfPlace(InPlace):
    def forward(self, images):
        return self.network((images - 0.4) / 0.3)


class Constant(nn.Module):
    """Gives one answer to all images, with a weight that requires gradients."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(float(CLASSES)))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(45, CLASSES)
    ).eval()


def batch(model, n=7, shape=(1, 11, 9)):
    images = torch.rand(n, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return images, model(images.clone()).argmax(1)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("each", [False, True], ids=["one generator", "one per image"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_default_dtype_changes_no_point(name, norm, each, request):
    model = network()
    images, labels = batch(model)

    def attacked():
        generators = torch_generator(3, "attack")
        if each:
            generators = [torch_generator(3, "attack", number) for number in range(len(images))]
        return ATTACKS[name](EPSILON[norm], norm)(model, images, labels, generators=generators)

    expected = attacked()
    request.getfixturevalue("float64_by_default")
    assert torch.equal(attacked(), expected)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_model_that_writes_into_its_input_is_attacked_as_one_that_does_not(name, norm):
    torch.manual_seed(1)
    inner, attack = network(), ATTACKS[name](EPSILON[norm], norm)
    images, labels = batch(OutOfPlace(inner))
    before = images.clone()
    found = attack(InPlace(inner), images, labels)
    assert torch.equal(images, before)
    assert torch.equal(found, attack(OutOfPlace(inner), images, labels))
    assert attack.threat_model.distance(found, images).max() <= EPSILON[norm] * (1 + 1e-6)


def test_an_attack_in_a_training_step_passes_copies_too():
    inner, attack = network(), PGD(0.04, 0.02, 3)
    images, labels = batch(OutOfPlace(inner))
    before = images.clone()
    found = [attack.run(model(inner), images, labels, images) for model in (InPlace, OutOfPlace)]
    assert torch.equal(*found)
    assert torch.equal(images, before)


def test_verdicts_and_checks_on_a_model_that_writes_into_its_input():
    inner = network()
    # A whole number of rows: filling up would make a copy
    images, labels = batch(OutOfPlace(inner), n=16)
    before = images.clone()
    attack = PGD(0.04, 0.01, 3, early_stop=True)
    results = []
    for model in (InPlace(inner), OutOfPlace(inner)):
        verdicts, worst = attack_batch(
            model, images, labels, attack, positions=torch.arange(16), seed=0
        )
        results.append((verdicts.robust_top1, worst, quick_checks(model, images, labels, attack)))
    assert torch.equal(images, before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_functions_are_attacked_as_modules_are(name, norm):
    model, attack = network(), ATTACKS[name](EPSILON[norm], norm)
    images, labels = batch(model)
    assert torch.equal(
        attack(lambda pixels: model(pixels), images, labels), attack(model, images, labels)
    )
    verdicts = [
        attack_batch(asked, images, labels, attack, positions=torch.arange(7), seed=0)[
            0
        ].robust_top1
        for asked in (model.forward, model)
    ]
    assert torch.equal(*verdicts)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


ANSWERS = {
    "tuple": (
        lambda logits: (logits, None),
        TypeError,
        "logits .* not a tuple of 2: return one of its elements",
    ),
    "dict": (
        lambda logits: {"out": logits},
        TypeError,
        "logits .* not a dict with the keys 'out': return one of its values",
    ),
    "array": (lambda logits: logits.detach().numpy(), TypeError, "logits .* a tensor, not ndarray"),
    "None": (lambda logits: None, TypeError, "logits .* a tensor, not NoneType"),
    "one logit": (
        lambda logits: logits[:, :1],
        ValueError,
        "logits .* of at least 2 classes, not of 1",
    ),
    "flat": (lambda logits: logits[:, 0], ValueError, r"logits .* here \(7, classes\), not \(7,\)"),
    "map": (
        lambda logits: logits[:, :, None, None],
        ValueError,
        r"logits .* here \(7, classes\), not \(7, 6, 1, 1\)",
    ),
    "mean": (
        lambda logits: logits.mean(0, keepdim=True),
        ValueError,
        r"logits .* here \(7, classes\), not \(1, 6\)",
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_not_logits_is_an_error_of_one_line(name, answer):
    change, error, message = ANSWERS[answer]
    model, attack = network(), ATTACKS[name](0.04, "linf")
    images, labels = batch(model)
    with pytest.raises(error, match=message) as raised:
        attack(lambda pixels: change(model(pixels)), images, labels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [-1, CLASSES, 255])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_label_that_is_not_a_class_is_the_same_error_everywhere(name, wrong):
    model, attack = network(), ATTACKS[name](0.04, "linf")
    images, labels = batch(model)
    labels[4] = wrong
    for run in (
        attack,
        partial(attack_batch, attack=attack, positions=torch.arange(7), seed=0),
        partial(quick_checks, attack=attack),
    ):
        with pytest.raises(
            ValueError, match=rf"labels: {wrong} is not one of the model's 6 classes, 0 to 5"
        ):
            run(model, images, labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2),
            r"images: expected the shape \(B, C, H, W\), not \(2, 3, 4\)$",
        ),
        (
            torch.zeros(2, 3, 0, 4),
            torch.zeros(2),
            r"images: expected the shape \(B, C, H, W\), not \(2, 3, 0, 4\)",
        ),
        (
            torch.zeros(2, 1, 4, 4).half(),
            torch.zeros(2).long(),
            "images: expected float32 or float64, not torch.float16",
        ),
        (
            torch.zeros(2, 1, 4, 4).byte(),
            torch.zeros(2).long(),
            "images: expected float32 or float64, not torch.uint8",
        ),
        (
            torch.full((2, 1, 4, 4), 1 + 2e-7),
            torch.zeros(2).long(),
            r"in \[0, 1\], found 1.000000238\d* to 1.000000238",
        ),
        (
            torch.full((2, 1, 4, 4), -1e-9),
            torch.zeros(2).long(),
            r"in \[0, 1\], found -1e-09 to -1e-09",
        ),
        (
            torch.full((2, 1, 4, 4), 17.0),
            torch.zeros(2).long(),
            "found 17 to 17; models normalize inside",
        ),
        (torch.full((2, 1, 4, 4), float("nan")), torch.zeros(2).long(), "found nan to nan"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), "labels: expected integers, not torch.float32"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2).bool(),
            "labels: expected integers, not torch.bool",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2, 1).long(),
            r"labels: .* the shape \(2,\), not \(2, 1\)",
        ),
        (torch.zeros(2, 1, 4, 4), [0, 1], "labels: expected a tensor, not list"),
    ],
)
def test_an_error_about_a_batch_says_what_is_wrong(images, labels, message):
    with pytest.raises(ValueError, match=message):
        FGSM(0.1)(network(), images, labels)


@pytest.mark.parametrize("without_modes", [exported, compiled_and_frozen])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_module_without_modes_is_attacked_and_measured(without_modes):
    model = network()
    images, labels = batch(model)
    other = without_modes(model)
    attack = PGD(0.04, 0.01, 3, early_stop=True)
    torch.testing.assert_close(attack(other, images, labels), attack(model, images, labels))
    report = robust_accuracy(other, [(images, labels)], attack)
    assert report.robust_top1 == robust_accuracy(model, [(images, labels)], attack).robust_top1


def test_a_model_made_in_inference_mode_is_an_error_of_one_line():
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"^model: its weights were made in torch.inference_mode"):
        PGD(0.1, 0.1, 1)(model, torch.rand(2, 1, 11, 9), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("generators", "error", "message"),
    [
        (3, TypeError, "^generators: expected a torch.Generator, .* not int$"),
        (
            lambda distribution, shape: distribution(shape),
            ValueError,
            r"^generators: the function must return the shape \(7, 1, 11, 9\), not \(1, 11, 9\)$",
        ),
    ],
)
def test_an_error_about_generators_says_what_is_wrong(generators, error, message):
    model = network()
    with pytest.raises(error, match=message):
        PGD(0.1, 0.1, 1)(model, *batch(model), generators=generators)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tensors_from_inference_mode_work_inside_and_outside_of_it(name, dtype):
    model, attack = network(), ATTACKS[name](0.04, "linf")
    images, labels = batch(model)
    expected = attack(model, images, labels)
    with torch.inference_mode():
        inside = images.clone(), labels.to(dtype).clone()
        first = attack(model, *inside)
        verdicts = attack_batch(model, *inside, attack, positions=torch.arange(7), seed=0)[0]
        quick_checks(model, *inside, attack)
    assert torch.equal(first, expected)
    assert torch.equal(attack(model, *inside), expected)
    outside = attack_batch(model, images, labels, attack, positions=torch.arange(7), seed=0)[0]
    assert torch.equal(verdicts.robust_top1, outside.robust_top1)


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_path_to_the_pixels_attacks_end_in_the_ball(name):
    images, attack = batch(network())[0], ATTACKS[name](0.04, "linf")
    labels, weights = torch.full((7,), CLASSES - 1), Constant()
    blind = {
        "constant": weights,
        "function with weights": lambda pixels: weights(pixels),
        "detached": lambda pixels: (
            weights(pixels) + pixels.detach().mean(dim=(1, 2, 3)).unsqueeze(1)
        ),
        "no graph": lambda pixels: weights(pixels).detach(),
        "integers": lambda pixels: weights(pixels).detach().long(),
    }
    for kind, model in blind.items():
        found = attack(model, images, labels)
        assert attack.threat_model.distance(found, images).max() <= 0.04 + 1e-6, kind
    checks = quick_checks(weights, images, labels, PGD(0.04, 0.01, 3))
    assert checks[0].verdict == "failed"
    assert "7 of 7 images" in checks[0].detail


class Broken(nn.Module):
    """NaN in one class for the images whose first pixel is light."""

    def __init__(self, column):
        super().__init__()
        self.network, self.column = network(), column

    def forward(self, images):
        logits = self.network(images)
        bad = (images[:, :1, 0, 0] > 0.5) & (torch.arange(CLASSES) == self.column)
        return logits.masked_fill(bad, float("nan"))


@pytest.mark.parametrize("name", ATTACKS)
def test_nan_counts_as_wrong_even_for_the_label_itself(name):
    images, labels = batch(network())
    images[:, 0, 0, 0] = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9])
    attack = ATTACKS[name](0.001, "linf")
    for column in range(CLASSES):
        model = Broken(column)
        found = attack(model, images, labels)
        assert found.isfinite().all()
        verdicts, _ = attack_batch(model, images, labels, attack, positions=torch.arange(7), seed=0)
        assert not verdicts.clean_top1[::2].any()
        assert not verdicts.robust_top1[::2].any()
        assert not verdicts.robust_top5[::2].any()
        assert (verdicts.clean_prediction[::2] == NONE).all()
        assert (verdicts.prediction[::2] == NONE).all()
        assert verdicts.clean_top1[1::2].any()


def test_a_targeted_attack_does_not_take_nan_for_its_target():
    logits = torch.zeros(2, CLASSES)
    logits[0, 4], logits[1, 4] = float("nan"), 1.0
    reached = PGD(0.1, 0.1, 1, targeted=True).reached(logits, torch.tensor([4, 4]))
    assert reached.tolist() == [0, 2]
    assert wrongness(logits, torch.tensor([4, 4])).tolist() == [2, 0]


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd", "square"])
@pytest.mark.parametrize("epsilon", [0.3, 5.0])
def test_l2_balls_of_large_images_are_kept(attack, epsilon):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 5, stride=9), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 4)
    ).eval()
    images, labels = batch(model, 2, (3, 320, 250))
    found = ATTACKS[attack](epsilon, "l2")(model, images, labels)
    longest = (found.double() - images.double()).flatten(1).norm(dim=1).max()
    assert longest <= epsilon * (1 + 1e-6)


def test_points_that_a_subclass_returns_are_projected_into_the_ball():
    class Careless(PGD):
        def perturb(self, model, images, labels, generators):
            model(images)
            return images.fill_(float("nan"))

    model = network()
    images, labels = batch(model)
    assert torch.equal(Careless(0.1, 0.1, 1)(model, images, labels), images)
