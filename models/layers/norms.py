"""Norm layers, each called as `(channels, **its own arguments)`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.config.section import Positive
from base.registry import with_attributes
from models.layers.conv_norm.precision import without_autocast


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
    return GroupNorm(groups, channels, affine=affine)


def instance_norm(channels: int, affine: bool = True) -> nn.InstanceNorm2d:
    """Instance normalization over (H, W), without running statistics."""
    return InstanceNorm2d(channels, affine=affine)


@with_attributes(normalizes=False)
def no_norm(channels: int, affine: bool = True) -> nn.Identity:
    """The identity, for convolutions that normalize themselves; every argument is ignored."""
    return nn.Identity()


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose output has the dtype and the memory format of its input.

    On CUDA, autocast would make the output float32, of twice the size, and torch up to 2.14 makes
    it contiguous. The statistics are float32 sums in any case. Outside of the CPU, whose kernel
    reads float32 parameters beside bfloat16 images, weight and bias are cast to the input's dtype.

    State: `weight`, `bias`, as in `nn.GroupNorm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, *)` to the same shape."""
        weight = self.weight
        bias = self.bias
        if self.affine and input.device.type != "cpu":
            weight = weight.to(input.dtype)
            bias = bias.to(input.dtype)
        with without_autocast(input):
            output = F.group_norm(input, self.num_groups, weight, bias, self.eps)
        return _in_memory_format_of(input, output)


class InstanceNorm2d(nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` whose output has the memory format of its input; torch makes it
    contiguous.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        return _in_memory_format_of(input, super().forward(input))


def _in_memory_format_of(input: Tensor, output: Tensor) -> Tensor:
    # With one channel or one pixel both formats are the same, and the output stays as it is.
    if input.is_contiguous() or input.ndim != 4:
        return output
    if input.is_contiguous(memory_format=torch.channels_last):
        return output.contiguous(memory_format=torch.channels_last)
    return output
