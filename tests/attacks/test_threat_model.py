"""Laws of projection and steps, on cases that hypothesis generates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.threat_model import NORMS, ThreatModel, lengths


@st.composite
def situations(draw):
    """A threat model, images in [0, 1] and points anywhere, float64 `(B, C, H, W)`."""
    shape = tuple(draw(st.integers(1, most)) for most in (3, 3, 4, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = torch.from_numpy(
        generator.choice([0.0, 1.0, 0.5], shape) if draw(st.booleans()) else generator.random(shape)
    )
    reach = draw(st.sampled_from([0.0, 1e-6, 0.03, 1.0, 50.0, 1e6]))
    points = images + reach * torch.from_numpy(generator.standard_normal(shape))
    norm = draw(st.sampled_from(NORMS))
    largest = 1 if norm == "linf" else 10
    epsilon = draw(st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 1.0]) | st.floats(0, largest))
    return ThreatModel(norm, epsilon), images, points


@settings(max_examples=120, deadline=None)
@given(situations())
def test_projection_is_into_the_allowed_set_and_idempotent(situation):
    threat, images, points = situation
    projected = threat.project(points, images)
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (threat.distance(projected, images) <= threat.epsilon * (1 + 1e-12) + 1e-15).all()
    torch.testing.assert_close(
        threat.project(projected, images), projected, rtol=0, atol=1e-6 * max(threat.epsilon, 1e-9)
    )
    torch.testing.assert_close(threat.project(images, images), images, rtol=0, atol=0)


@settings(max_examples=120, deadline=None)
@given(situations(), st.integers(0, 2**32 - 1))
def test_no_change_in_the_ball_is_nearer_than_the_projected_one(situation, seed):
    """The angle between the way back and the way to any other point of a convex set is never
    acute."""
    threat, images, points = situation
    change = points - images
    nearest = threat.bound(change)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other = threat.bound(
            torch.randn(change.shape, generator=generator, dtype=change.dtype) * 2 * threat.epsilon
        )
        product = ((change - nearest) * (other - nearest)).flatten(1).sum(1)
        scale = change.flatten(1).norm(dim=1) * threat.epsilon + 1e-12
        assert (product <= 4e-6 * scale).all()


@settings(max_examples=60, deadline=None)
@given(situations(), st.floats(0, 1))
def test_a_step_moves_by_its_size_or_not_at_all(situation, size):
    threat, images, gradient = situation
    # Any numbers, zeros among them
    gradient = gradient - images
    moved = threat.distance(threat.step(images, gradient, size), images)
    still = (gradient == 0).flatten(1).all(1)
    assert (moved[still] == 0).all()
    torch.testing.assert_close(
        moved[~still], torch.full_like(moved[~still], size), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(2, 3, 256, 256), (1, 1, 1, 300_000), (2, 4, 5, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_lengths_are_exact_to_float32_for_any_number_of_pixels(shape, scale):
    change = scale * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(change.double().flatten(1), dim=1)
    found = lengths(change).double().flatten()
    torch.testing.assert_close(found, exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("largest", [1e-45, 3e-42, 1e-20, 1e30])
def test_a_gradient_of_any_size_gives_a_step_of_full_length(largest):
    gradient = largest * torch.linspace(-1, 1, 2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    step = ThreatModel("l2", 1.0).direction(gradient)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.ones(2))


def test_a_change_is_shortened_before_pixels_are_clamped():
    """The other way round, a pixel at its border would leave its length to the other pixels."""
    images = torch.tensor([0.95, 0.5], dtype=torch.float64).reshape(1, 1, 1, 2)
    points = images + torch.tensor([3.0, 4.0], dtype=torch.float64)
    # 0.1 * (3, 4) / 5 is added, and 0.95 + 0.06 is outside of the pixel range
    expected = torch.tensor([1.0, 0.58], dtype=torch.float64).reshape(1, 1, 1, 2)
    projected = ThreatModel("l2", 0.1).project(points, images)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-6)
