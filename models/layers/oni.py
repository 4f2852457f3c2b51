"""ONI: convolutions with a weight matrix made orthogonal by Newton's iteration.

Lei Huang, Li Liu, Fan Zhu, Diwen Wan, Zehuan Yuan, Bo Li, Ling Shao: "Controllable
Orthogonalization in Training DNNs", CVPR 2020, arXiv:2004.00887."""

from math import sqrt
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from models.layers.conv_norm.precision import without_autocast

EPSILON = 1e-5
Rule = Literal["paper", "original"]
"""What is done to a matrix with more rows than columns; see `newton_orthogonalize`."""


def newton_orthogonalize(matrices: Tensor, iterations: int, rule: Rule = "paper") -> Tensor:
    """Approximately orthonormal rows, or columns where the rows are more, by Newton's iteration.

    With `Z` centered along its rows, `S = Z Z^T + 1e-5 I`, `s = |S|_F`, `B_0 = I` and `B <- 1.5 B -
    0.5 B^3 S / s`, the result is `B Z / sqrt(s)`, which tends to the polar factor `(Z Z^T)^(-1/2)
    Z`. A matrix with more rows than columns is treated by its columns, `Z B / sqrt(s)` with `S =
    Z^T Z + 1e-5 I`. The number of iterations bounds how far small singular values rise.

    The original ConvNorm's code iterates such a matrix with S itself, `B <- 1.5 B - 0.5 B^3 S`, and
    divides the result alone, by `sqrt(s)`. That is another matrix, far from orthonormal columns,
    and it diverges where an eigenvalue of S is large: only weights that were trained with this rule
    should be used with it.

    Args:
        matrices: `(groups, rows, columns)`.
        iterations: the paper's T; 3 to 7 are usual.
        rule: "paper" or "original"; both treat a matrix without more rows than columns alike.

    Returns:
        `(groups, rows, columns)`.
    """
    rows, columns = matrices.shape[-2:]
    # a single column minus its mean would be zero
    centered = matrices - matrices.mean(dim=-1, keepdim=True) if columns > 1 else matrices
    wide = centered if rows <= columns else centered.mT
    identity = torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)
    gram = torch.bmm(wide, wide.mT) + EPSILON * identity
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    if rule == "paper" or rows <= columns:
        gram = gram / norm
    # root * gram is carried along: the same numbers as B^3 S, but there rounding errors grow and
    # end in NaN after some 10 steps
    root, root_gram = identity.expand_as(gram), gram
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * torch.bmm(root, root_gram)
        root, root_gram = torch.bmm(step, root), torch.bmm(root_gram, step)
    orthogonal = torch.bmm(root, wide) / norm.sqrt()
    return orthogonal if rows <= columns else orthogonal.mT


class ONIConv2d(nn.Conv2d):
    """Convolution with the weight `WNScale * newton_orthogonalize(weight)`.

    The weight is a `(C_out, C_in / groups * k_h * k_w)` matrix, one per group of the convolution.
    Training and eval do the same.

    State: `weight`, `bias`, `WNScale` `(C_out, 1, 1, 1)`, a trainable factor per output channel.

    Deviation: where C_out exceeds the fan-in, as in a first layer and in the 1x1 convolutions that
    widen a shortcut (four layers of a ResNet-18), the original ConvNorm follows a rule of its own.
    Here it is the paper's unless `rule` says otherwise; checkpoints of the original need the
    original's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`.
        iterations: the number of Newton iterations, the paper's T.
        scale: initial `WNScale`; sqrt(2) keeps the variance through a ReLU (the original's 1.414).
        rule: what is done to a weight with more outputs than inputs: "paper", or "original", as
            ConvNorm's code does; see `newton_orthogonalize`.

    Raises:
        ValueError: the rule is unknown.
    """

    normalizes_weights: ClassVar = True
    config_names: ClassVar = {"rule": "oni_rule"}
    untold: ClassVar = {
        "oni_rule": (
            "original",
            "as the original ConvNorm's code has it; --set arch.args.oni_rule=paper if this project trained it",
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
            raise ValueError(f"rule={rule!r}: expected {' or '.join(map(repr, get_args(Rule)))}")
        self.iterations = iterations
        self.rule: Rule = rule
        self.WNScale = nn.Parameter(torch.full((out_channels, 1, 1, 1), scale))

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, as `nn.Conv2d` with the orthogonalised
        weight."""
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def normalized_weight(self) -> Tensor:
        """`WNScale` times the orthogonalised weight, in the weight's shape."""
        with without_autocast(self.weight):
            matrices = self.weight.unflatten(0, (self.groups, -1)).flatten(2)
            orthogonal = newton_orthogonalize(matrices, self.iterations, self.rule)
            return orthogonal.reshape(self.weight.shape) * self.WNScale
