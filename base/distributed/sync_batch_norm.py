"""Batch normalization over the images of all processes that train together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.precision import widened


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Let the batch normalization of `model` use the statistics of the whole minibatch.

    The inner batch normalization of ConvNorm is converted, too. Parameters, buffers and their names
    stay the same. On a GPU it is torch's own class, for which the host waits for the device in
    every layer.
    """
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # torch's own class raises an error for tensors on the CPU.
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm2d
    return model


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose mean and variance, in training, are those of all processes' images.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`, with the mean and the biased variance over
    `(B, H, W)` of every process. The running variance follows the unbiased one. The gradient flows
    through mean and variance into the inputs of every process. All processes must call it equally
    often. It computes in float32, or float64 for such inputs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = widened(input)
        # Shards differ in size, so the count is summed together with the values.
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        # A second sum, of centered values: E[x^2] - E[x]^2 would lose digits to cancellation.
        centered = values - mean.reshape(1, -1, 1, 1)
        variance = _SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / total
        if self.track_running_stats:
            self._update_running_stats(mean.detach(), variance.detach() * total / (total - 1))
        output = centered * (variance + self.eps).rsqrt().reshape(1, -1, 1, 1)
        if self.affine:
            output = output * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:
            # As in torch: a cumulative average instead of an exponential one.
            factor = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return _all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _all_reduce_sum(gradient)


def _all_reduce_sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
