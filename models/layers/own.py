"""OWN: convolutions whose weight matrix is orthogonalized exactly, in groups of output channels.

Lei Huang, Xianglong Liu, Bo Lang, Adams Wei Yu, Yongliang Wang, Bo Li: "Orthogonal Weight
Normalization: Solution to Optimization over Multiple Dependent Stiefel Manifolds in Deep Neural
Networks", AAAI 2018, arXiv:1709.06079.
"""

from math import sqrt
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from base.config.section import Positive
from base.precision import widened
from models.layers.conv_norm.precision import without_autocast

MAX_GROUP_SIZE = 64
"""The largest number of output channels in one orthogonal group. The cost of the eigendecomposition
grows with its third power. The paper uses 64.
"""


class _InverseSquareRoot(torch.autograd.Function):
    """`S^(-1/2)` of symmetric positive semidefinite `(groups, n, n)` matrices.

    Forward, with eigenvalues clamped from below at a small fraction of the largest:

        S        = U diag(a) U^T
        S^(-1/2) = U diag(a^(-1/2)) U^T

    Backward, for the gradient G, with divided differences K (Daleckii and Krein):

        K_ij  = -1 / (sqrt(a_i) sqrt(a_j) (sqrt(a_i) + sqrt(a_j)))
        dL/dS = U (K . (U^T (G + G^T) / 2 U)) U^T
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `S^(-1/2)`, and U and `a^(1/2)`, which only `backward` reads."""
        values, vectors = torch.linalg.eigh(matrices)
        # Ascending order: the last eigenvalue is the largest.
        floor = values[..., -1:] * (values.shape[-1] * torch.finfo(values.dtype).eps)
        roots = values.maximum(floor).clamp_min(1e-12).sqrt()
        return (vectors / roots.unsqueeze(-2)) @ vectors.mT, vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        _, vectors, roots = output
        ctx.mark_non_differentiable(vectors, roots)
        ctx.save_for_backward(vectors, roots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        vectors, roots = ctx.saved_tensors
        left, right = roots.unsqueeze(-1), roots.unsqueeze(-2)
        # Finite for equal eigenvalues, where the gradient of an eigendecomposition is 0 / 0.
        differences = -1 / (left * right * (left + right))
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (differences * inner) @ vectors.mT


def whiten_rows(matrices: Tensor) -> Tensor:
    """Make rows orthonormal.

        Z      = matrix - mean of each row
        result = (Z Z^T)^(-1/2) Z

    No matrix with orthonormal rows is nearer to Z. Where the rank of Z is less than the number of
    rows, its zero singular values stay zero. A single column is not centered.

    Args:
        matrices: `(groups, rows, columns)`.

    Returns:
        `(groups, rows, columns)`, of the same type; it is computed in float32 at least.
    """
    z = widened(matrices)
    # A single column minus its mean would be zero.
    if matrices.shape[-1] > 1:
        z = z - z.mean(dim=-1, keepdim=True)
    root, _, _ = _InverseSquareRoot.apply(torch.bmm(z, z.mT))
    return (root @ z).to(matrices.dtype)


class OWNConv2d(nn.Conv2d):
    """Convolution with the weight `WNScale * whiten_rows(weight)`, in groups of output channels.

    The weight is a `(C_out, C_in / groups * k_h * k_w)` matrix. Each group of `C_out / norm_groups`
    neighboring rows is made orthonormal. Training and eval do the same.

    On a GPU the host waits once in every forward pass, because torch checks that the
    eigendecomposition has converged. ONI (`ONIConv2d`) iterates instead: it does not wait, and is
    not exact.

    State: `weight`, `bias`, `WNScale` `(C_out, 1, 1, 1)`, a buffer.

    Deviations: the original always takes 64 groups, which fails for fewer than 64 output channels.
    Here `norm_groups` follows from the layer's size where it is not given. A weight of deficient
    rank stays finite.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`.
        norm_groups: the number of groups; None for the largest groups with at most 64 rows, and no
            more rows than the rank that the fan-in allows (fan-in minus 1, after centering).
        scale: `WNScale`; sqrt(2) keeps the variance through a ReLU (the original's 1.414).

    Raises:
        ValueError: `norm_groups` does not divide the number of output channels.
    """

    normalizes_weights: ClassVar = True
    buffers_follow_weights: ClassVar = True
    # In a config, `norm_groups` already means the groups of a GroupNorm.
    config_names: ClassVar = {"norm_groups": "own_groups"}
    WNScale: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        norm_groups: Positive | None = None,
        scale: Annotated[float, Field(gt=0)] = sqrt(2),
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
        )
        if norm_groups is None:
            # Centered rows have one dimension less than the fan-in, and no more rows than
            # dimensions can be orthogonal.
            limit = max(1, min(MAX_GROUP_SIZE, self.weight[0].numel() - 1))
            divisors = [n for n in range(1, limit + 1) if (out_channels // groups) % n == 0]
            norm_groups = out_channels // max(divisors)
        if norm_groups < 1 or out_channels % norm_groups:
            raise ValueError(
                f"norm_groups={norm_groups} does not divide out_channels={out_channels}"
            )
        self.norm_groups = norm_groups
        self.register_buffer("WNScale", torch.full((out_channels, 1, 1, 1), scale))

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, as in `nn.Conv2d`."""
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def normalized_weight(self) -> Tensor:
        """`WNScale` times the orthogonalized weight, in the weight's shape."""
        with without_autocast(self.weight):
            matrices = self.weight.unflatten(0, (self.norm_groups, -1)).flatten(2)
            return whiten_rows(matrices).reshape(self.weight.shape) * self.WNScale
