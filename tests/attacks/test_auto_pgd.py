"""Auto-PGD: its authors' code is the reference; strength, bookkeeping, and independence of the
batch."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks.auto_pgd import APGD, _State, checkpoints
from attacks.pgd import PGD
from base.seeding import torch_generator

N_CLASSES = 6
EPSILON = {"linf": 0.06, "l2": 0.5}


class Recorded(nn.Module):
    """Remembers every batch it is shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        return self.model(images)


def make_images(n, seed):
    """Noisy pictures of `N_CLASSES` classes."""
    generator = torch_generator(seed, "images")
    prototypes = torch.rand(N_CLASSES, 3, 8, 8, generator=torch_generator(0, "prototypes"))
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    images = 0.35 * prototypes[labels] + 0.65 * torch.rand(n, 3, 8, 8, generator=generator)
    return images, labels


@pytest.fixture(scope="module")
def model():
    """A small network that has learned the classes, against weak attacks, so that epsilon
    matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, N_CLASSES),
        )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(80):
        images, labels = make_images(64, 100 + step)
        images = PGD(0.04, 0.04, 1)(
            model, images, labels, generators=torch_generator(step, "start")
        )
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def losses_of(attack, model, points, labels):
    with torch.no_grad():
        return attack.losses(model(points), labels)


def verdicts(model, points, labels):
    with torch.no_grad():
        return model(points).argmax(dim=1) != labels


def reference_attack(model, norm, loss, first_loss=None):
    """The authors' code; with `first_loss` it counts the first step as the paper does."""
    module = pytest.importorskip("pyautoattack.autopgd_base")

    class CountsFirstStep(module.APGDAttack):
        def check_oscillation(self, losses, step, length, best, k3):
            before = torch.cat([first_loss[None], losses])[step - length + 1 : step + 1]
            return ((losses[step - length + 1 : step + 1] > before).sum(0) <= length * k3).float()

    kind = module.APGDAttack if first_loss is None else CountsFirstStep
    norm, epsilon = {"linf": "Linf", "l2": "L2"}[norm], EPSILON[norm]
    return kind(model, n_iter=50, norm=norm, eps=epsilon, loss=loss, device="cpu")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_trajectory_of_the_authors_code(model, norm, loss, monkeypatch):
    images, labels = make_images(48, 1)
    attack = APGD(EPSILON[norm], 50, norm, loss=loss, early_stop=False)
    start = attack.start(images, torch_generator(0, "start"))
    monkeypatch.setattr(APGD, "start", lambda attack, images, generators: start)
    ours, theirs = Recorded(model), Recorded(model)
    points = attack(ours, images, labels)
    authors = reference_attack(theirs, norm, loss, losses_of(attack, model, start, labels))
    authors.init_hyperparam(images)
    best, robust, best_loss, _ = authors.attack_single_run(images, labels, x_init=start)

    assert len(ours.seen) == 1 + len(theirs.seen) == 1 + 51  # ours looks at the images first
    apart = (torch.stack(ours.seen[1:]) - torch.stack(theirs.seen)).abs().amax(dim=(2, 3, 4))
    assert apart[:10].max() < 1e-5
    # Later a difference in the last digit may decide whether a loss has grown, and so whether a
    # step size is halved
    same = apart.amax(dim=0) < 1e-5
    assert same.float().mean() > 0.8
    robust &= ~verdicts(model, images, labels)
    assert 0 < robust.sum() < len(robust)
    assert torch.equal(~verdicts(model, points, labels), robust)
    torch.testing.assert_close(
        losses_of(attack, model, points, labels)[robust], best_loss[robust], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(points[robust & same], best[robust & same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_verdicts_are_those_of_the_authors_unchanged_code(model, norm, loss, monkeypatch):
    images, labels = make_images(48, 2)
    attack = APGD(EPSILON[norm], 50, norm, loss=loss)
    start = attack.start(images, torch_generator(1, "start"))
    # One restart, for those that are not misclassified already
    monkeypatch.setattr(
        APGD, "start", lambda attack, left, generators: start[~verdicts(model, images, labels)]
    )
    points = attack(model, images, labels)
    authors = reference_attack(model, norm, loss)
    authors.init_hyperparam(images)
    _, robust, best_loss, _ = authors.attack_single_run(images, labels, x_init=start)
    robust &= ~verdicts(model, images, labels)
    assert torch.equal(~verdicts(model, points, labels), robust)
    ours = losses_of(attack, model, points, labels)[robust]
    assert abs(ours.mean() - best_loss[robust].mean()) < 0.01 * best_loss[robust].mean().abs()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_start_is_that_of_the_authors_code(norm):
    images, labels = make_images(5, 1)
    shown = Recorded(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    authors = reference_attack(shown, norm, "ce")
    authors.n_iter = 1
    authors.init_hyperparam(images)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        authors.attack_single_run(images, labels % 3)
    start = APGD(EPSILON[norm], norm=norm).start(images, torch.Generator().manual_seed(7))
    torch.testing.assert_close(start, shown.seen[0])


def test_checkpoints_of_the_paper():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(1)) == []
    assert checkpoints(4) == {1: 1, 2: 1, 3: 1}


def test_both_conditions_halve_the_step_size():
    start = torch.zeros(3, 1, 1, 1)
    state = _State(torch.arange(3), start, torch.zeros(3), start, 1.0)
    # Rises: 2 of 2; 1 of 2; none. Then all rise 2 of 2 times, but only the first image goes beyond
    # its largest loss
    for losses in ([0, 0, 0], [1, 9, -1], [2, 8, -2]):
        state.points = torch.tensor(losses).float().reshape(3, 1, 1, 1)
        state.record(torch.tensor(losses).float(), state.points)
    state.adapt(0.75 * 2)
    assert state.step_size.flatten().tolist() == [1, 0.5, 0.5]
    assert state.points.flatten().tolist() == state.gradient.flatten().tolist() == [2, 9, 0]
    state.halved = torch.tensor([False, False, True])  # as if the second had not been halved
    for losses in ([3, 8.2, -1.5], [4, 8.5, -1]):
        state.record(torch.tensor(losses), state.points)
    state.adapt(0.75 * 2)
    assert state.step_size.flatten().tolist() == [1, 0.25, 0.5]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_not_weaker_than_pgd_with_as_many_gradients(model, norm, loss):
    images, labels = make_images(64, 3)
    epsilon = EPSILON[norm]
    found = []
    for attack in (
        APGD(epsilon, 30, norm, loss=loss, early_stop=False),
        PGD(epsilon, epsilon / 4, 30, norm, loss=loss),
    ):
        generators = [torch_generator(0, "start", index) for index in range(64)]
        points = attack(model, images, labels, generators=generators)
        found.append(
            (losses_of(attack, model, points, labels).mean(), verdicts(model, points, labels).sum())
        )
    assert found[0][0] > 0.95 * found[1][0]  # one of 64 images may find more on the other way
    assert found[0][1] >= found[1][1] - 1  # of 64: a first misclassified point is luck


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_stay_in_the_ball(model, norm):
    images, labels = make_images(16, 4)
    images = images.round()  # at the borders of the pixel range
    shown = Recorded(model)
    attack = APGD(EPSILON[norm], 15, norm, restarts=2, early_stop=False)
    points = attack(shown, images, labels)
    assert len(points) == 16
    for seen in [*shown.seen[:17], points]:
        assert seen.min() >= 0
        assert seen.max() <= 1
        assert attack.threat_model.distance(seen, images).max() <= EPSILON[norm] + 1e-6


def test_images_do_not_depend_on_the_batch(model):
    exact = deepcopy(model).double()  # so that sums in another order do not turn signs
    images, labels = make_images(12, 5)
    images = images.double()

    def attacked(which):
        generators = [torch_generator(3, "start", index) for index in which]
        return APGD(0.05, 12, restarts=3)(
            exact, images[which], labels[which], generators=generators
        )

    together = attacked(range(12))
    torch.testing.assert_close(
        together, torch.cat([attacked([index]) for index in range(12)]), rtol=0, atol=1e-6
    )
    assert 0 < verdicts(exact, together, labels).sum() < 12


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_early_stop_saves_passes_and_changes_no_verdict(model, loss):
    model, (images, labels) = deepcopy(model).double(), make_images(32, 6)
    images = images.double()
    generators = [[torch_generator(1, "start", index) for index in range(32)] for _ in range(2)]
    hasty, thorough = Recorded(model), Recorded(model)
    early = APGD(0.06, 20, restarts=2, loss=loss)(hasty, images, labels, generators=generators[0])
    late = APGD(0.06, 20, restarts=2, loss=loss, early_stop=False)(
        thorough, images, labels, generators=generators[1]
    )
    assert torch.equal(verdicts(model, early, labels), verdicts(model, late, labels))
    assert sum(map(len, hasty.seen)) < 0.7 * sum(map(len, thorough.seen))
    clean_errors = verdicts(model, images, labels)
    assert torch.equal(early[clean_errors], images[clean_errors])


def test_restarts_attack_only_images_that_are_not_broken(model):
    images, labels = make_images(32, 7)
    shown = Recorded(model)
    once = APGD(0.05, 5, early_stop=False)(model, images, labels)
    APGD(0.05, 5, restarts=2, early_stop=False)(shown, images, labels)
    unbroken = int((~verdicts(model, once, labels)).sum())
    assert 0 < unbroken < 32
    assert [len(seen) for seen in shown.seen] == [32] * 7 + [unbroken] * 6


def test_targeted_leads_to_the_target(model):
    images, labels = make_images(32, 8)
    targets = (labels + 1) % N_CLASSES
    points = APGD(0.25, 20, targeted=True)(model, images, targets)
    with torch.no_grad():
        before, after = (model(shown).argmax(1) == targets for shown in (images, points))
    assert after.sum() > before.sum() + 10


def test_a_model_that_gives_nan_is_broken_and_does_not_stop_the_others():
    class Nan(nn.Module):
        def forward(self, images):
            logits = images.mean(dim=(2, 3))
            return torch.where(images[:, :1, 0, 0] > 0.5, logits, torch.nan)

    images = torch.full((2, 3, 8, 8), 0.4)
    images[:, 0] = 0.9
    images[1, 0, 0, 0] = 0.1
    points = APGD(0.01, 5)(Nan(), images, torch.zeros(2, dtype=torch.int64))
    assert points.isfinite().all()
    assert torch.equal(points[1], images[1])
    assert not torch.equal(points[0], images[0])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"rho": 1.5}, {"loss": "mse"}, {"norm": "l1"}]
)
def test_arguments_out_of_range_are_errors(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        APGD(0.1, **wrong)


def test_exactly_the_fraction_rho_of_rises_is_too_few():
    start = torch.zeros(2, 1, 1, 1)
    state = _State(torch.arange(2), start, torch.zeros(2), start, 1.0)
    # 3 and 4 rises in 4 steps
    for losses in ([0, 0], [1, 1], [2, 2], [3, 3], [3, 4]):
        state.record(torch.tensor(losses).float(), start)
    state.adapt(0.75 * 4)
    assert state.step_size.flatten().tolist() == [0.5, 1]


def test_a_step_size_is_not_halved_twice_in_a_row_for_the_same_largest_loss():
    """Whichever condition has halved it at the checkpoint before."""
    start = torch.zeros(1, 1, 1, 1)
    state = _State(torch.arange(1), start, torch.zeros(1), start, 1.0)
    # Every loss is a rise, but none goes beyond the 9 of the beginning
    for losses, size in (([9, 0, 1], 0.5), ([2, 3], 0.5), ([4, 5], 0.25), ([6, 7], 0.25)):
        for loss in losses:
            state.record(torch.tensor([float(loss)]), start)
        state.adapt(0.75 * 2)
        assert float(state.step_size) == size
