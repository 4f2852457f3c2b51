"""OCNN: a penalty that pulls convolutions towards orthogonality.

Jiayun Wang, Yubei Chen, Rudrasis Chakraborty, Stella X. Yu: "Orthogonal Convolutional Neural
Networks", CVPR 2020, arXiv:1911.12207, section 3."""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv_norm.precision import without_autocast


def conv_orthogonality(
    kernel: Tensor, stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | None = None
) -> Tensor:
    """`|conv2d(K, K, stride, padding) - I|_F`: how far the rows of the convolution's operator are
    from orthonormal.

    Entry `(o, p, lag)` of the self-convolution is the inner product of filter o with filter p
    shifted by that lag, a multiple of the stride; `I` is 1 where `o = p` at the center. The norm is
    not squared, as in the authors' code; the paper squares it.

    Args:
        kernel: `(C_out, C_in, k_h, k_w)`.
        stride: of the convolution, per axis.
        padding: None for the paper's `floor((k - 1) / stride) * stride`, with which the center is
            lag zero. The authors' code always takes 1: with a 3x3 kernel at stride 2 it then asks a
            filter to match itself shifted by one pixel.

    Returns:
        float32 (or the kernel's precision, if higher) without dimensions. The gradient at distance
        zero is zero.
    """
    strides = (stride, stride) if isinstance(stride, int) else stride
    if padding is None:
        padding = tuple((k - 1) // s * s for k, s in zip(kernel.shape[-2:], strides, strict=True))
    with without_autocast(kernel):
        products = F.conv2d(kernel, kernel, stride=strides, padding=padding)
        identity = torch.zeros_like(products)
        identity[:, :, products.shape[-2] // 2, products.shape[-1] // 2].fill_diagonal_(1)
        return torch.linalg.vector_norm(products - identity)


def matrix_orthogonality(matrix: Tensor) -> Tensor:
    """`|W W^T - I|_F` or `|W^T W - I|_F`, whichever is the smaller matrix: the other cannot be the
    identity.

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
    """The sum of both distances over every convolution of a model, whatever its architecture.

    1x1 kernels are measured by `matrix_orthogonality`, all others by `conv_orthogonality` at their
    stride; each group of a grouped convolution by itself. Depthwise convolutions, whose filters
    share no input, are left out: ConvNorm's `bpconv`. The weight that is measured is the parameter,
    before any normalization that the layer does.

    Returns:
        A differentiable tensor without dimensions; 0 for a model without convolutions.
    """
    distances = []
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or (
            module.groups > 1 and module.groups == module.in_channels
        ):
            continue
        # dilated filters meet at lags that are multiples of the dilation: of those the stride keeps
        # every stride / gcd-th
        strides = tuple(s // gcd(s, d) for s, d in zip(module.stride, module.dilation, strict=True))
        for kernel in module.weight.chunk(module.groups):
            pointwise = module.kernel_size == (1, 1)
            distances.append(
                matrix_orthogonality(kernel) if pointwise else conv_orthogonality(kernel, strides)
            )
    return torch.stack(distances).sum() if distances else torch.zeros(())
