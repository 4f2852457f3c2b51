"""Square: succeeds where gradients do not, uses forward passes only, and follows its paper."""

import pytest
import torch
from torch import nn

from attacks.pgd import PGD
from attacks.square import Square, _bump_grid, _bumps
from base.seeding import torch_generator

NORMS = ["linf", "l2"]
EPSILON = {"linf": 0.1, "l2": 1.0}


class Linear(nn.Module):
    """A linear model of images 3 x 8 x 8, with integer weights and a little float64, so that no sum
    depends on its order."""

    def __init__(self, n_classes=4, seed=0):
        super().__init__()
        generator = torch_generator(seed, "weights")
        self.weight = torch.randint(-8, 9, (192, n_classes), generator=generator).double() / 16
        self.batches = []

    def forward(self, images):
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.double().flatten(1) @ self.weight


class Rounded(Linear):
    """Sees 16 shades only: right as a classifier, and its gradient is zero everywhere."""

    def forward(self, images):
        return ((images * 15).round() / 15).double().flatten(1) @ self.weight


def make_images(model, n, seed=1):
    """Images and what the model says about them."""
    images = torch.rand(n, 3, 8, 8, generator=torch_generator(seed, "images"))
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def broken(model, points, labels):
    with torch.no_grad():
        return model(points).argmax(dim=1) != labels


@pytest.mark.parametrize("norm", NORMS)
def test_breaks_a_model_without_gradients(norm):
    model = Rounded()
    images, labels = make_images(model, 12)
    epsilon = EPSILON[norm]
    pgd = PGD(epsilon, epsilon / 4, 20, norm, early_stop=True)(model, images, labels)
    square = Square(epsilon, 200, norm)(model, images, labels)
    assert broken(model, pgd, labels).sum() <= 4
    assert broken(model, square, labels).sum() >= 10


def test_breaks_a_model_whose_cross_entropy_is_saturated():
    class Steep(Linear):
        def forward(self, images):
            return 1e6 * (images.double().flatten(1) @ self.weight)

    model = Steep()
    images, labels = make_images(model, 12)
    pgd = PGD(0.1, 0.025, 20, random_start=False)(model, images, labels)
    assert not broken(model, pgd, labels).any()
    assert broken(model, Square(0.1, 200)(model, images, labels), labels).sum() >= 10


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 12), (2, 4, 3)])
def test_every_point_tried_is_in_the_ball(norm, shape):
    tried = []

    class Stubborn(nn.Module):
        def forward(self, images):
            tried.append(images)
            return torch.stack([images.mean((1, 2, 3)) + 9, images.std((1, 2, 3))], dim=1)

    images = torch.rand(6, *shape, generator=torch_generator(0, "images"))
    images[::2] = images[::2].round()
    attack = Square(EPSILON[norm], 40, norm)
    points = attack(Stubborn(), images, torch.zeros(6, dtype=torch.int64))
    assert len(tried) == 41
    for seen in [*tried, points]:
        assert seen.isfinite().all()
        assert seen.min() >= 0
        assert seen.max() <= 1
        assert attack.threat_model.distance(seen, images).max() <= EPSILON[norm] + 1e-6
    distances = torch.stack(
        [attack.threat_model.distance(seen, images)[1::2] for seen in tried[1:]]
    )
    assert distances.mean() > 0.8 * EPSILON[norm]  # the budget is used


@pytest.mark.parametrize("norm", NORMS)
def test_uses_forward_passes_only(norm, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    model = Linear()  # asserts that no graph is built
    images, labels = make_images(model, 4)
    Square(0.01, 10, norm)(model, images, labels)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["margin", "ce", "dlr"])
def test_loss_of_the_kept_points_only_grows(norm, loss):
    kept = []

    class Observed(Square):
        def propose(self, points, images, query, generators):
            kept.append(self.losses(model(points), labels))
            assert query == len(kept)
            return super().propose(points, images, query, generators)

    model = Linear()
    images, labels = make_images(model, 64)
    attack = Observed(EPSILON[norm] / 20, 60, norm, loss=loss)
    with torch.no_grad():
        # The model is too sure of these to be misled, so that none of them leaves the batch
        surest = attack.losses(model(images), labels).argsort()[:8]
    images, labels = images[surest], labels[surest]
    # `perturb`, as a call projects its points once more, which rounds
    points = attack.perturb(model, images, labels, torch_generator(0, "attack"))
    with torch.no_grad():
        kept.append(attack.losses(model(points), labels))
    kept = torch.stack(kept)
    assert (kept.diff(dim=0) >= 0).all()
    assert (kept[-1] > kept[0]).all()


def test_broken_images_leave_and_queries_are_counted():
    model = Linear()
    images, labels = make_images(model, 16)
    labels[:2] = (labels[:2] + 1) % 4
    model.batches.clear()
    points = Square(0.05, 30)(model, images, labels)
    assert model.batches[:2] == [16, 14]
    assert model.batches == sorted(model.batches, reverse=True)
    assert model.batches[-1] < 14
    assert len(model.batches) <= 31
    assert torch.equal(points[:2], images[:2])


@pytest.mark.parametrize("norm", NORMS)
def test_images_do_not_depend_on_the_batch(norm):
    model = Linear()
    images, labels = make_images(model, 8)

    def attacked(which):
        generators = [torch_generator(5, "attack", index) for index in which]
        return Square(EPSILON[norm] / 3, 40, norm)(
            model, images[which], labels[which], generators=generators
        )

    together = attacked(range(8))
    torch.testing.assert_close(
        together, torch.cat([attacked([index]) for index in range(8)]), rtol=0, atol=1e-6
    )
    assert 0 < broken(model, together, labels).sum() < 8


def test_the_same_seed_gives_the_same_points():
    model = Linear()
    images, labels = make_images(model, 4)
    first, again, other = (Square(0.02, 20, seed=seed)(model, images, labels) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_linf_start_is_stripes_and_proposals_are_squares():
    images = torch.full((400, 3, 8, 8), 0.5)
    attack = Square(0.1, 1000)
    start = attack.start(images, torch_generator(0, "attack")) - images
    torch.testing.assert_close(start.abs(), torch.full_like(start, 0.1))
    assert torch.equal(start, start[:, :, :1].expand_as(start))
    assert start.std() > 0.09
    side = attack.side(30, 8, 8)
    new = attack.propose(images, images, 30, torch_generator(1, "attack")) - images
    touched = new.abs().amax(dim=1) > 0
    assert (touched.sum(dim=(1, 2)) == side**2).all()
    assert touched.any(dim=0).all()  # corners, too
    assert torch.equal(new.amax(dim=(2, 3)) > 0, new.amin(dim=(2, 3)) >= 0)  # one sign per channel


def test_schedule_of_the_authors_code():
    module = pytest.importorskip("pyautoattack.square")
    authors = module.SquareAttack(None, n_queries=500, eps=0.1, p_init=0.8, resc_schedule=True)
    ours = Square(0.1, 500)
    for query in range(1, 500):
        share = authors.p_selection(query)
        assert ours.side(query, 32, 32) == max(round((share * 1024) ** 0.5), 1)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 7, 12])
def test_bumps_of_the_authors_code(side):
    module = pytest.importorskip("pyautoattack.square")
    authors = module.SquareAttack(None, norm="L2", eps=1.0, device="cpu")
    with torch.random.fork_rng():
        drawn = [authors.eta(side) for _ in range(10)]
    lying = _bumps(side)
    assert all(any(torch.allclose(bump, other, atol=1e-6) for other in lying) for bump in drawn)


def test_bump_grid_covers_the_image():
    images = torch.rand(3, 2, 32, 32)
    grid = _bump_grid(images, torch_generator(0, "attack"))
    assert (grid[:, :, 1:31, 1:31] != 0).all()
    assert (grid != 0).sum() == 3 * 2 * 30 * 30
    tiles = grid[:, :, 1:31, 1:31].reshape(3, 2, 5, 6, 5, 6).square().sum(dim=(3, 5))
    torch.testing.assert_close(tiles, torch.ones_like(tiles))


@pytest.mark.parametrize("norm", NORMS)
def test_as_strong_as_the_authors_code(norm):
    module = pytest.importorskip("pyautoattack.square")
    model = Linear()
    images, labels = make_images(model, 64)
    epsilon = EPSILON[norm] / 4
    authors = module.SquareAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], n_queries=100, eps=epsilon, device="cpu"
    )
    with torch.random.fork_rng(), torch.no_grad():
        theirs = authors.perturb(images.clone(), labels)
    ours = Square(epsilon, 100, norm)(model, images, labels)
    counts = [int(broken(model, points, labels).sum()) for points in (ours, theirs)]
    assert 0 < counts[1] < 64
    assert abs(counts[0] - counts[1]) <= 4, counts


@pytest.mark.parametrize(
    "wrong", [{"queries": 0}, {"p_init": 0.0}, {"p_init": 1.5}, {"loss": "mse"}]
)
def test_arguments_out_of_range_are_errors(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Square(0.1, **wrong)
