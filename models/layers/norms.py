"""Norm layers, each called as `(channels, **its own arguments)`."""

from torch import nn

from base.config.section import Positive
from base.registry import with_attributes


@with_attributes(batch_statistics=True)
def batch_norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    """Batch normalization over (B, H, W)."""
    return nn.BatchNorm2d(channels, affine=affine)


def group_norm(channels: int, affine: bool = True, norm_groups: Positive = 32) -> nn.GroupNorm:
    """Group normalization (arXiv:1803.08494).

    Args:
        channels: the number of channels.
        affine: whether there are a weight and a bias per channel.
        norm_groups: groups of channels; where they do not divide the channels, the next smaller
            number that does.
    """
    limit = max(1, min(norm_groups, channels))
    groups = max(n for n in range(1, limit + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def instance_norm(channels: int, affine: bool = True) -> nn.InstanceNorm2d:
    """Instance normalization over (H, W), without running statistics."""
    return nn.InstanceNorm2d(channels, affine=affine)


@with_attributes(normalizes=False)
def no_norm(channels: int, affine: bool = True) -> nn.Identity:
    """The identity, for convolutions that normalize themselves; every argument is ignored."""
    return nn.Identity()
