"""The doctor passes a healthy network, and finds each defect by the check that is meant for it."""

import copy
import json
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import nn

from attacks import FGSM, PGD
from attacks.square import Square
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import MemoryImages
from evaluation import doctor
from evaluation.checks import Check, images_to_decide, judge_rate, quick_checks

EPSILON = 0.1
ATTACK = PGD(EPSILON, EPSILON / 4, 10)
ZERO, FINITE, LOGITS = (
    "gradients are not zero",
    "gradients and logits are finite",
    "outputs are logits",
)
RANDOM, BATCH = "the forward pass is not random", "batch size changes nothing"
HUGE, BLACK_BOX = "a huge epsilon leaves chance", "no black-box search finds more"
N = 60
ENOUGH = 120
"""With so many images the doctor can pass a network; with 60 it can only fail one."""


class Wrapped(nn.Module):
    """A network with a function before and one behind it."""

    def __init__(self, network, before=lambda images: images, behind=lambda logits: logits):
        super().__init__()
        self.network, self.before, self.behind = network, before, behind

    def forward(self, images):
        return self.behind(self.network(self.before(images)))


class StuckInTraining(nn.Module):
    """A network that normalizes by the statistics of the batch in evaluation mode, too."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self

    def forward(self, images):
        return self.network(images)


def digits():
    data = load_digits()
    images, labels = (
        torch.from_numpy(data.images).float().unsqueeze(1) / 16,
        torch.from_numpy(data.target),
    )
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def loader(n=N, batch_size=60):
    _, _, images, labels = digits()
    pixels = MemoryImages((255 * images[:n]).round().byte())
    names = [str(digit) for digit in range(10)]
    return ImageDataLoader(
        pixels, labels[:n].numpy(), names, mean=[0.0], std=[1.0], batch_size=batch_size
    )


@pytest.fixture(scope="module")
def healthy():
    """A small network, trained with PGD on digits of 8 x 8 pixels."""
    threads = torch.get_num_threads()
    # Threads cost more than they save on so little work
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 10)),
        )
    images, labels, _, _ = digits()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    draws = torch.Generator().manual_seed(0)
    attack = PGD(EPSILON, EPSILON / 2, 4)
    for _ in range(250):
        batch = torch.randint(len(images), (64,), generator=draws)
        found = attack(network, images[batch], labels[batch], generators=draws)
        optimizer.zero_grad()
        F.cross_entropy(network(found), labels[batch]).backward()
        optimizer.step()
    yield network.eval()
    torch.set_num_threads(threads)


def failed(checks):
    # pytest shows it if the test fails
    print(*checks, sep="\n")
    return {check.name for check in checks if check.verdict == "failed"}


def test_a_check_is_one_line():
    assert (
        str(Check("epsilon 0 equals clean", True, "61.0 % and 61.0 %"))
        == "pass  epsilon 0 equals clean: 61.0 % and 61.0 %"
    )
    assert str(Check("outputs are logits", False, "between 0 and 1")).startswith(
        "FAIL  outputs are logits: "
    )
    assert str(judge_rate("Square finds nothing", 0, 9, 0.05, "it breaks")).startswith(
        "undecided  Square finds nothing: it"
    )


@pytest.mark.parametrize(
    ("attack", "largest", "of_curve"),
    [
        (ATTACK, 0.5, "PGD-10, linf 25.5/255, step 6.375/255, 1 start"),
        (FGSM(EPSILON), 0.5, "PGD-20, linf"),
        (PGD(0.5, 0.125, 10, "l2", early_stop=5), 4.0, "PGD-10, l2 0.5, step 0.125"),
    ],
    ids=["pgd", "fgsm", "l2"],
)
def test_a_healthy_network_passes_everything(healthy, attack, largest, of_curve, capsys):
    parameters = [parameter.clone() for parameter in healthy.state_dict().values()]
    report = doctor(healthy, loader(ENOUGH, 120), attack)
    checks, curve = report.checks, report.curve
    assert report.reliable
    print(*checks, sep="\n")
    verdicts = {(check.passed, check.verdict, check.images_needed) for check in checks}
    assert verdicts == {(True, "passed", None)}
    assert len({check.name for check in checks}) == len(checks) >= 12
    assert all("\n" not in str(check) for check in checks)
    json.dumps(report.as_dict())
    assert report.as_dict()["curve_attack"].startswith(of_curve)
    assert capsys.readouterr().err == "", "no progress bar without a terminal"

    sizes, accuracies = zip(*curve, strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 0
    assert attack.threat_model.epsilon in sizes
    assert sizes[-1] == largest
    assert accuracies[0] > 0.9
    assert accuracies[-1] <= 0.1
    assert not healthy.training
    assert all(
        parameter.requires_grad and parameter.grad is None
        for parameter in copy.deepcopy(healthy).parameters()
    )
    for before, after in zip(parameters, healthy.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_the_curve_holds_the_attack_itself(healthy):
    # In two batches
    curve = dict(doctor(healthy, loader(32, 16), ATTACK, seed=0).curve)
    _, _, images, labels = digits()
    images = (255 * images[:32]).round() / 255
    stronger = PGD(EPSILON, EPSILON / 4, 10, early_stop=True)(healthy, images, labels[:32])
    share = float((healthy(stronger).argmax(1) == labels[:32]).float().mean())
    # One image of 32 more or less, as the random starts differ
    assert abs(share - curve[EPSILON]) <= 1 / 32


BROKEN = {
    "huge logits": (
        lambda network: Wrapped(network, behind=lambda logits: 1e6 * logits),
        {ZERO, HUGE, BLACK_BOX},
        set(),
    ),
    "quantized input": (
        lambda network: Wrapped(network, before=lambda images: (8 * images).round() / 8),
        {ZERO, HUGE, BLACK_BOX},
        set(),
    ),
    "input outside of torch": (
        lambda network: Wrapped(
            network, before=lambda images: torch.from_numpy(images.detach().numpy().copy())
        ),
        {ZERO, HUGE, BLACK_BOX},
        set(),
    ),
    "softmax": (
        lambda network: Wrapped(network, behind=lambda logits: logits.softmax(1)),
        {LOGITS},
        set(),
    ),
    "NaN gradients": (
        lambda network: Wrapped(
            network, behind=lambda logits: logits + 0 * (logits - logits.detach()).abs().sqrt()
        ),
        {FINITE, HUGE, BLACK_BOX},
        set(),
    ),
    "NaN logits": (
        lambda network: Wrapped(network, behind=lambda logits: logits * float("nan")),
        {FINITE},
        set(),
    ),
    "random input": (
        lambda network: Wrapped(
            network, before=lambda images: images + 0.3 * torch.randn_like(images)
        ),
        {RANDOM, BATCH},
        None,
    ),
    "batch statistics": (lambda network: StuckInTraining(copy.deepcopy(network)), {BATCH}, None),
}
"""Name -> how to break a network, the checks that must fail, and those that may fail beside them
(None: any, as all verdicts are in doubt)."""


@pytest.mark.parametrize("name", BROKEN)
def test_broken_networks_are_found(healthy, name):
    breaking, expected, others = BROKEN[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = failed(doctor(breaking(healthy), loader(), ATTACK, seed=0).checks)
    assert expected <= found
    if others is not None:
        # An attack without gradients is noise of one draw, and ten draws may find more
        assert found <= expected | others | {"not weaker than random noise"}


def test_an_attack_that_hardly_moves_is_found(healthy):
    found = failed(
        doctor(healthy, loader(), PGD(EPSILON, EPSILON / 40, 10, random_start=False), seed=0).checks
    )
    assert {"not weaker than FGSM", "40 steps, not 10, find little more", BLACK_BOX} <= found


def test_fgsm_that_points_the_wrong_way_is_found(healthy):
    """Gradients are zero at the images and right elsewhere, as after training against one step."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = healthy

        def forward(self, images):
            at_image = (255 * images - (255 * images).round()).abs().amax(dim=(1, 2, 3)) < 1e-3
            logits = self.network(images)
            return torch.where(
                at_image[:, None],
                logits.detach() + 1e-9 * images.flatten(1).sum(1, keepdim=True),
                logits,
            )

    found = failed(doctor(Flat(), loader(), FGSM(0.2), seed=0).checks)
    assert "20 steps, not 1, find little more" in found


def test_low_precision_passes(healthy):
    low = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    checks = doctor(healthy, loader(ENOUGH, 120), ATTACK, seed=0, **low).checks
    print(*checks, sep="\n")
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    "attack", [PGD(0.1, 0.1, 1, targeted=True), PGD(0, 0, 1)], ids=["targeted", "epsilon 0"]
)
def test_the_doctor_rejects_attacks_that_it_cannot_examine(healthy, attack):
    with pytest.raises(ValueError, match="untargeted attack with an epsilon above 0"):
        doctor(healthy, loader(), attack, seed=0)


class Marked(nn.Module):
    """Linear, and without a gradient for the images whose first pixel is light."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        nn.init.orthogonal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return torch.where((images[:, 0, 0, :1] > 0.85), logits.detach(), logits)


@pytest.mark.parametrize(
    ("marked", "verdict"),
    [(0, "passed"), (2, "passed"), (10, "undecided"), (25, "failed")],
)
@pytest.mark.parametrize("attack", [FGSM(0.01), Square(0.01, 10)], ids=["fgsm", "square"])
def test_zero_gradients_are_judged_by_the_images_they_hide(marked, verdict, attack):
    images = 0.7 * torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:marked, 0, 0, 0] = images[100 : 100 + marked, 0, 0, 0] = 1
    model = Marked().train()
    labels = model(images).argmax(1)
    # Misclassified images do not count
    labels[100:] = (labels[100:] + 1) % 3
    checks = quick_checks(model, images, labels, attack)
    assert checks[0].verdict == verdict
    assert not failed(checks[1:])
    assert f"for {marked} of 100 images" in checks[0].detail
    assert model.training
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_gradients_that_vanish_and_hide_nothing_pass(healthy):
    """In float32 the gradient of cross entropy is tiny, and the attack may still succeed with it;
    that of the DLR loss has its full size."""
    _, _, images, labels = digits()
    confident = Wrapped(healthy, behind=lambda logits: 20 * logits)
    dlr, entropy = (PGD(EPSILON, EPSILON / 4, 10, loss=loss) for loss in ("dlr", "ce"))
    assert quick_checks(confident, images, labels, dlr)[0].passed
    assert not quick_checks(confident, images, labels, entropy)[0].passed
    less = Wrapped(healthy, behind=lambda logits: 2 * logits)
    less = quick_checks(less, images, labels, entropy)[0]
    assert "vanish for 0 of" not in less.detail
    assert less.passed, less


def test_a_rate_passes_or_fails_if_its_interval_excludes_the_limit():
    limit = 0.05
    for found, n in ((0, 72), (0, 73), (3, 200), (4, 200), (16, 200), (17, 200)):
        low, high = binomtest(found, n).proportion_ci(method="wilson")
        check = judge_rate("rate", found, n, limit, "detail")
        assert check.passed == (check.verdict == "passed") == (high <= limit)
        assert (check.verdict == "failed") == (low > limit)
        assert (check.images_needed is None) == (check.verdict != "undecided")
    verdicts = [judge_rate("", found, 8, 0.05, "").verdict for found in (0, 1, 8)]
    assert verdicts == ["undecided", "undecided", "failed"]


@pytest.mark.parametrize(
    ("found", "n", "limit"),
    [(0, 8, 0.05), (1, 50, 0.05), (12, 200, 0.05), (50, 300, 0.15), (0, 40, 0.06)],
)
def test_the_number_of_images_needed_decides_and_fewer_do_not(found, n, limit):
    share, z = found / n, 1.959964
    needed = images_to_decide(found, n, limit)
    # Wilson's formula and not scipy's, which takes whole numbers of images found.
    for images, decides in ((needed, True), (needed - 1, False)):
        center = (share + z**2 / (2 * images)) / (1 + z**2 / images)
        root = sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
        half = z / (1 + z**2 / images) * root
        assert (center + half <= limit or center - half > limit) == decides


def test_a_rate_at_its_limit_needs_a_finite_number_of_images():
    check = judge_rate("rate", 10, 200, 0.05, "")
    assert check.verdict == "undecided"
    assert 1000 < check.images_needed < 10**6


def test_the_model_never_gets_an_empty_batch(healthy):
    def some(images):
        assert len(images)
        return images

    wrong = Wrapped(healthy, before=some, behind=lambda logits: logits.roll(1, dims=1))
    checks = doctor(wrong, loader(6, 6), ATTACK, seed=0).checks
    assert not failed(checks)


def test_few_images_can_fail_a_network_but_not_pass_it(healthy):
    checks = doctor(healthy, loader(8, 8), ATTACK, seed=0).checks
    assert not failed(checks)
    undecided = [check for check in checks if check.verdict == "undecided"]
    assert BLACK_BOX in {check.name for check in undecided}
    assert not any(check.passed for check in undecided)
    assert max(check.images_needed for check in undecided) == 73
    blind = Wrapped(healthy, before=lambda images: (8 * images).round() / 8)
    assert HUGE in failed(doctor(blind, loader(8, 8), ATTACK, seed=0).checks)


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        (lambda logits: logits.softmax(1), {LOGITS}),
        (lambda logits: logits.softmax(1).bfloat16(), {LOGITS}),
        (lambda logits: logits.log_softmax(1), set()),
        (lambda logits: logits.sigmoid(), set()),
        (lambda logits: logits + 1e-3 * torch.randn_like(logits), {RANDOM}),
        (lambda logits: logits.where(torch.arange(3) < 2, -1e9), set()),
        (lambda logits: logits.where(torch.arange(3) < 2, float("-inf")), {FINITE}),
    ],
    ids=[
        "softmax",
        "bfloat16 softmax",
        "log softmax",
        "sigmoid",
        "noise",
        "masked class",
        "infinite",
    ],
)
def test_quick_checks_look_at_the_outputs(behind, expected):
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = Wrapped(Marked(), behind=behind)
    checks = quick_checks(model, images, Marked()(images).argmax(1), ATTACK)
    assert failed(checks) == expected


def test_quick_checks_work_inside_inference_mode_and_in_parts():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = Marked()
    labels = model(images).argmax(1)
    with torch.inference_mode():
        inside = quick_checks(model, images.clone(), labels.clone(), ATTACK)
    assert inside == quick_checks(model, images, labels, ATTACK)
    assert not failed(quick_checks(model, images, labels, ATTACK, 7))
