"""Losses and metrics against numpy."""

import numpy as np
import pytest
import torch

from models.losses import LOSSES
from models.metrics import METRICS


@pytest.mark.parametrize(
    ("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_cross_entropy_is_per_sample_and_in_float32_at_least(given, returned):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(given) * 30
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    losses = LOSSES["cross_entropy"](logits, labels)
    exact = logits.double().numpy()
    expected = (
        np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1))
        + exact.max(1)
        - exact[range(6), labels]
    )
    assert losses.dtype == returned
    tolerance = 20 * torch.finfo(returned).eps
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)


def test_metrics_count_samples():
    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((50, 9)), generator.integers(0, 9, 50)
    ranks = (logits > logits[range(50), labels][:, None]).sum(1)
    for name, expected in (("top1", (ranks == 0).sum()), ("top5", (ranks < 5).sum())):
        count = METRICS[name](torch.from_numpy(logits), torch.from_numpy(labels))
        assert count.dtype == torch.int64
        assert count.shape == ()
        assert count == expected
    assert METRICS["top5"](torch.rand(7, 3), torch.zeros(7, dtype=torch.int64)) == 7
    assert METRICS["my_metric"] is METRICS["top1"]
    assert METRICS["my_metric2"] is METRICS["top5"]


def test_logits_that_are_nan_are_wrong_in_every_metric():
    logits = torch.eye(4).repeat(2, 1)
    labels = torch.arange(4).repeat(2)
    broken = logits.clone()
    broken[0, 0], broken[5, 3] = torch.nan, torch.nan
    shares = torch.nn.functional.one_hot(labels, 4).double()
    for metric in (METRICS["top1"], METRICS["top5"]):
        assert (int(metric(logits, labels)), int(metric(broken, labels))) == (8, 6)
        assert (float(metric(logits, shares)), float(metric(broken, shares))) == (8, 6)
        assert int(metric(torch.full((3, 7), torch.nan), torch.zeros(3, dtype=torch.int64))) == 0
