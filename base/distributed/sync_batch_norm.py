"""Batch normalization over the images of all processes that train together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """`model` with batch normalization by the statistics of the whole minibatch, all processes'
    shards together, ConvNorm's inner ones included. Weights, statistics and their names stay.

    On CUDA it is torch's own `SyncBatchNorm`, which exists for no other device; elsewhere
    `SynchronizedBatchNorm2d`."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm2d
    return model


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose mean and variance, in training, are those of the `(B, H, W)` of every
    process.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` with the biased variance; the running
    variance follows the unbiased one. The gradient flows through mean and variance, into the inputs
    of every process. Every process has to call it equally often. Computed in float32 at least; no
    faster than its two sums over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = input if input.dtype == torch.float64 else input.float()
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centered = values - mean.reshape(1, -1, 1, 1)
        variance = _SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / total
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * total / (total - 1))
        output = centered * (variance + self.eps).rsqrt().reshape(1, -1, 1, 1)
        if self.affine:
            output = output * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)
        return output.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors. What each does with it matters to all: the gradient is the
    sum of theirs."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
