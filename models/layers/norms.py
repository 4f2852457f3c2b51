"""Norm layers, each called as `(channels, affine=True, norm_groups=32)`."""

from torch import nn


def batch_norm(channels: int, affine: bool = True, norm_groups: int = 32) -> nn.BatchNorm2d:
    """Batch normalisation over (B, H, W); `norm_groups` is ignored."""
    return nn.BatchNorm2d(channels, affine=affine)


def group_norm(channels: int, affine: bool = True, norm_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation (arXiv:1803.08494) in the largest number of groups up to `norm_groups` that divides `channels`."""
    groups = max(n for n in range(1, max(1, min(norm_groups, channels)) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def instance_norm(channels: int, affine: bool = True, norm_groups: int = 32) -> nn.InstanceNorm2d:
    """Instance normalisation over (H, W), without running statistics; `norm_groups` is ignored."""
    return nn.InstanceNorm2d(channels, affine=affine)


def no_norm(channels: int, affine: bool = True, norm_groups: int = 32) -> nn.Identity:
    """The identity, for convolutions that normalise themselves; every argument is ignored."""
    return nn.Identity()
