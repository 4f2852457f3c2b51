"""One model in several processes: gradients are averaged, and its copies are kept equal."""

import inspect
import warnings

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from base.distributed.collectives import broadcast
from base.distributed.process_group import world_size


def wrap_ddp(model: nn.Module, compression: str | None = None) -> nn.Module:
    """Return `model` in DistributedDataParallel, which averages gradients over all processes in
    every backward pass, or `model` itself in a single process.

    All copies start with the weights of rank 0. Buffers are left to `distribute_bn` and
    `broadcast_buffers`.

    Args:
        model: the model, on its device.
        compression: `"bf16"` sends gradients in bfloat16, which is half the traffic; the weights
            and the optimizer keep their precision. None sends them as they are.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [device] if device.type == "cuda" else None
    # DistributedDataParallel would send buffers before every forward pass, also between the two of
    # TRADES. The first of them could then no longer be differentiated.
    names = inspect.signature(DistributedDataParallel).parameters
    if "forward_sync_buffers" in names:
        no_buffers = {"forward_sync_buffers": False}
    else:
        # The name before torch 2.14.
        no_buffers = {"broadcast_buffers": False}
    # With one input channel, two memory formats of a kernel are the same, but torch warns.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Gradients lie in the buffers that are sent, instead of being copied there and back.
    network = DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, **no_buffers
    )
    if compression == "bf16":
        # Only this needs torch's hooks, which are slow to import.
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        network.register_comm_hook(None, bf16_compress_hook)
    return network


def distribute_bn(model: nn.Module) -> None:
    """Overwrite the running statistics of `model` by those of rank 0.

    Each process computes them from other images, so they are sent after every update.
    """
    if world_size() > 1:
        broadcast(running_statistics(model))


def broadcast_buffers(model: nn.Module) -> None:
    """Overwrite all buffers of `model` by those of rank 0.

    Buffers that are functions of the weights (ConvNorm's spectrum, singular vectors) are equal on
    the CPU and equal up to rounding on a GPU, where sending them once per epoch is enough.
    """
    if world_size() > 1:
        broadcast([buffer for buffer in model.buffers() if buffer.numel()])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return what the layers of a model learn from images without a gradient, such as the means and
    variances of batch normalization.

    These are the persistent floating-point buffers, except those of layers whose class has
    `buffers_follow_weights`.
    """
    statistics = []
    for module in model.modules():
        if getattr(module, "buffers_follow_weights", False):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            if persistent and buffer.is_floating_point() and buffer.numel():
                statistics.append(buffer)
    return statistics
