"""ONI: convolutions with a weight matrix made orthogonal by Newton's iteration.

Lei Huang, Li Liu, Fan Zhu, Diwen Wan, Zehuan Yuan, Bo Li, Ling Shao: "Controllable
Orthogonalization in Training DNNs", CVPR 2020, arXiv:2004.00887.
"""

from math import sqrt
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from models.layers.conv_norm.precision import without_autocast

EPSILON = 1e-5

Rule = Literal["paper", "original"]
"""How a matrix with more rows than columns is treated; see `newton_orthogonalize`."""


def newton_orthogonalize(matrices: Tensor, iterations: int, rule: Rule = "paper") -> Tensor:
    """Make rows approximately orthonormal (columns, if there are fewer of them) by Newton's
    iteration.

        Z   = matrix - mean of each row
        S   = Z Z^T + 1e-5 I
        s   = |S|_F
        B_0 = I
        B_t = 1.5 B_(t-1) - 0.5 B_(t-1)^3 S / s     for t = 1 ... T
        result = B_T Z / sqrt(s)

    The result tends to the polar factor `(Z Z^T)^(-1/2) Z`. The number of iterations bounds how far
    small singular values rise. A matrix with more rows than columns is transposed after it is
    centered, and the result is transposed back. A single column is not centered.

    The code of the original ConvNorm iterates such a matrix with S itself, `B_t = 1.5 B_(t-1) - 0.5
    B_(t-1)^3 S`, and divides only the result by `sqrt(s)`. The columns are then far from
    orthonormal, and the iteration diverges where an eigenvalue of S is large. Use this rule only
    with weights that were trained with it.

    Args:
        matrices: `(groups, rows, columns)`.
        iterations: the paper's T; 3 to 7 are usual.
        rule: "paper" or "original". They differ only for more rows than columns.

    Returns:
        `(groups, rows, columns)`.
    """
    rows, columns = matrices.shape[-2:]
    z = matrices
    # A single column minus its mean would be zero.
    if columns > 1:
        z = matrices - matrices.mean(dim=-1, keepdim=True)
    if rows > columns:
        z = z.mT
    identity = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    gram = torch.bmm(z, z.mT) + EPSILON * identity
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    if rule == "paper" or rows <= columns:
        gram = gram / norm
    # The product B S is carried along with B. Computing B^3 S from B alone gives the same numbers,
    # but there rounding errors grow and end in NaN after some 10 iterations.
    root = identity.expand_as(gram)
    root_gram = gram
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * torch.bmm(root, root_gram)
        root = torch.bmm(step, root)
        root_gram = torch.bmm(root_gram, step)
    result = torch.bmm(root, z) / norm.sqrt()
    if rows > columns:
        result = result.mT
    return result


class ONIConv2d(nn.Conv2d):
    """Convolution with the weight `WNScale * newton_orthogonalize(weight)`.

    The weight is a `(C_out, C_in / groups * k_h * k_w)` matrix, one per group of the convolution.
    Training and eval do the same.

    State: `weight`, `bias`, `WNScale` `(C_out, 1, 1, 1)`, a trainable factor per output channel.

    Deviation: the original ConvNorm departs from the paper where C_out exceeds the fan-in. That is
    the case in a first layer and in the 1x1 convolutions that widen a shortcut (four layers of a
    ResNet-18). Here the paper's rule is the default. Checkpoints of the original need its own.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`.
        iterations: the number of Newton iterations, the paper's T.
        scale: initial `WNScale`; sqrt(2) keeps the variance through a ReLU (the original's 1.414).
        rule: how a weight with more outputs than inputs is treated: "paper", or "original", as
            in ConvNorm's code; see `newton_orthogonalize`.

    Raises:
        ValueError: the rule is unknown.
    """

    normalizes_weights: ClassVar = True
    config_names: ClassVar = {"rule": "oni_rule"}
    untold: ClassVar = {
        "oni_rule": (
            "original",
            "as the original ConvNorm's code has it; --set arch.args.oni_rule=paper if this project"
            " trained it",
        )
    }

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
        iterations: Annotated[int, Field(ge=1, le=100)] = 3,
        scale: Annotated[float, Field(gt=0)] = sqrt(2),
        rule: Rule = "paper",
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
        if rule not in get_args(Rule):
            expected = " or ".join(repr(known) for known in get_args(Rule))
            raise ValueError(f"rule={rule!r}: expected {expected}")
        self.iterations = iterations
        self.rule: Rule = rule
        self.WNScale = nn.Parameter(torch.full((out_channels, 1, 1, 1), scale))

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, as in `nn.Conv2d`."""
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def normalized_weight(self) -> Tensor:
        """`WNScale` times the orthogonalized weight, in the weight's shape."""
        with without_autocast(self.weight):
            matrices = self.weight.unflatten(0, (self.groups, -1)).flatten(2)
            orthogonal = newton_orthogonalize(matrices, self.iterations, self.rule)
            return orthogonal.reshape(self.weight.shape) * self.WNScale
