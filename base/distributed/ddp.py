"""One model in several processes: how its copies are trained together and kept equal."""

import inspect
import warnings

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from base.distributed.collectives import broadcast
from base.distributed.process_group import world_size


def wrap_ddp(model: nn.Module) -> nn.Module:
    """`model` behind DistributedDataParallel, which averages gradients over all processes in every
    backward pass; with one process `model` itself. All copies begin with the weights of rank 0.

    Buffers are not its business (see `distribute_bn`): it would send them before every forward
    pass, also between the two of TRADES, whose first then has no backward pass any more."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    index = [device] if device.type == "cuda" else None
    names = inspect.signature(DistributedDataParallel).parameters
    # its name until torch 2.14
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    # in a kernel of one input channel two orders in memory are the same one, of which torch takes
    # notice
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, device_ids=index, **{buffers: False})


def distribute_bn(model: nn.Module) -> None:
    """Give every process the running statistics of rank 0's copy of `model`.

    They come from different images in every process, so they are sent after every update.
    """
    if world_size() > 1:
        broadcast(running_statistics(model))


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process all buffers of rank 0's copy of `model`.

    Those that are functions of the weights (ConvNorm's spectrum, singular vectors) are equal on the
    CPU, and equal up to rounding on a GPU, where once in an epoch is enough.
    """
    if world_size() > 1:
        broadcast([buffer for buffer in model.buffers() if buffer.numel()])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What a model's layers take from images without a gradient, such as the means and variances of
    batch normalization: the floating-point buffers that a checkpoint holds, except those of layers
    whose class has `buffers_follow_weights`."""
    return [
        buffer
        for module in model.modules()
        if not getattr(module, "buffers_follow_weights", False)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
        and buffer.is_floating_point()
        and buffer.numel()
    ]
