"""OCNN: a penalty that pulls convolutions towards orthogonality.

Jiayun Wang, Yubei Chen, Rudrasis Chakraborty, Stella X. Yu: "Orthogonal Convolutional Neural
Networks", CVPR 2020, arXiv:1911.12207, section 3.
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv_norm.precision import without_autocast


def conv_orthogonality(
    kernel: Tensor, stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | None = None
) -> Tensor:
    """The distance of the rows of the convolution's operator from orthonormal rows.

        distance = |conv2d(K, K, stride, padding) - I|_F

    Entry `(o, p, lag)` of the self-convolution is the inner product of filter o with filter p
    shifted by that lag, a multiple of the stride. `I` is 1 at the center where `o = p`, else 0. The
    norm is not squared, as in the authors' code; the paper squares it.

    Args:
        kernel: `(C_out, C_in, k_h, k_w)`.
        stride: of the convolution, per axis.
        padding: None for the paper's `floor((k - 1) / stride) * stride`, which makes the center lag
            zero. The authors' code always takes 1. With a 3x3 kernel at stride 2 it then
            pulls a filter towards itself shifted by one pixel.

    Returns:
        A tensor without dimensions, in the kernel's precision also under autocast. The gradient at
        distance zero is zero.
    """
    strides = (stride, stride) if isinstance(stride, int) else stride
    if padding is None:
        padding = tuple((k - 1) // s * s for k, s in zip(kernel.shape[-2:], strides, strict=True))
    with without_autocast(kernel):
        products = F.conv2d(kernel, kernel, stride=strides, padding=padding)
        identity = torch.zeros_like(products)
        center = products.shape[-2] // 2, products.shape[-1] // 2
        identity[:, :, *center].fill_diagonal_(1)
        return torch.linalg.vector_norm(products - identity)


def matrix_orthogonality(matrix: Tensor) -> Tensor:
    """The distance of a matrix's rows, or columns if there are fewer, from orthonormal ones.

        distance = |W W^T - I|_F    or    |W^T W - I|_F

    The smaller of the two products is taken, because the larger one cannot be the identity.

    Args:
        matrix: `(C_out, ...)`, flattened to `(C_out, fan_in)`; meant for the weights of 1x1
            convolutions.

    Returns:
        A tensor without dimensions. The gradient at distance zero is zero.
    """
    with without_autocast(matrix):
        rows = matrix.flatten(1)
        wide = rows if rows.shape[0] <= rows.shape[1] else rows.mT
        identity = torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device)
        return torch.linalg.vector_norm(wide @ wide.mT - identity)


def penalty(model: nn.Module) -> Tensor:
    """The sum of the distances of all convolutions of a model.

    1x1 kernels are measured by `matrix_orthogonality`, all others by `conv_orthogonality` at their
    stride, and each group of a grouped convolution by itself. Depthwise convolutions, such as
    ConvNorm's `bpconv`, are left out, because their filters share no input. The weight that is
    measured is the parameter, before any normalization that the layer does.

    Returns:
        A differentiable tensor without dimensions; 0 for a model without convolutions.
    """
    distances = []
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        is_depthwise = module.groups > 1 and module.groups == module.in_channels
        if is_depthwise:
            continue
        # Dilated filters meet at lags that are multiples of the dilation. Of those the stride keeps
        # every (stride / gcd)-th.
        strides = tuple(s // gcd(s, d) for s, d in zip(module.stride, module.dilation, strict=True))
        for kernel in module.weight.chunk(module.groups):
            if module.kernel_size == (1, 1):
                distances.append(matrix_orthogonality(kernel))
            else:
                distances.append(conv_orthogonality(kernel, strides))
    if not distances:
        return torch.zeros(())
    return torch.stack(distances).sum()
