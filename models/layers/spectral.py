"""Spectral normalization: convolutions divided by the largest singular value of their weight
matrix.

Takeru Miyato, Toshiki Kataoka, Masanori Koyama, Yuichi Yoshida: "Spectral Normalization for
Generative Adversarial Networks", ICLR 2018, arXiv:1802.05957, algorithm 1.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv_norm.precision import without_autocast

EPSILON = 1e-12
"""Numbers up to this size count as zero."""

POWER_ITERATIONS = 15
"""Power iterations for a new weight, as in PyTorch's own spectral norm."""

# Our name -> its names in PyTorch's two implementations, the hook and the parametrization.
_OLD_NAMES = {
    "weight": ("weight_orig", "parametrizations.weight.original"),
    "weight_u": ("parametrizations.weight.0._u",),
    "weight_v": ("parametrizations.weight.0._v",),
    "bias": (),
}


class SpectralNormConv2d(nn.Conv2d):
    """Convolution with the weight `W / sigma`, where sigma is the largest singular value of W as a
    `(C_out, C_in / groups * k_h * k_w)` matrix.

    That matrix then has spectral norm 1. With zero padding, one group and stride 1, the operator
    norm of the convolution itself lies between 1 and `sqrt(k_h * k_w)`, for images no smaller than
    the kernel. sigma is estimated by the power iteration

        v     <- W^T u / |W^T u|
        u     <- W v / |W v|
        sigma  = u^T W v

    which continues from step to step; u and v are constants for the gradient. In training each
    forward pass makes one iteration. In eval the stored u and v are used. A new layer starts with
    15 iterations.

    State: `weight`, `weight_u` `(C_out,)`, `weight_v` `(C_in / groups * k_h * k_w,)`, `bias`.
    Checkpoints of `torch.nn.utils.spectral_norm` and of
    `torch.nn.utils.parametrizations.spectral_norm` load as well, with or without the `conv.` that
    the original's wrapper puts before their keys.

    Deviation: where a product vanishes (an all-zero weight), u and v are kept and the weight is not
    divided. The original returns NaN from then on.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`, but `bias` is False by default, as in the original.
    """

    normalizes_weights: ClassVar = True
    buffers_follow_weights: ClassVar = True
    weight_u: Tensor
    weight_v: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
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
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(self.weight[0].numel()), dim=0))
        for _ in range(POWER_ITERATIONS):
            self._iterate(self.weight.detach().flatten(1))

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, as `nn.Conv2d` with the normalized weight."""
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def normalized_weight(self) -> Tensor:
        """`weight / sigma`; in training it advances the power iteration."""
        with without_autocast(self.weight):
            matrix = self.weight.flatten(1)
            if self.training:
                self._iterate(matrix.detach())
            # Copies: a second forward pass before the backward pass must not change what autograd
            # saved in this one.
            u = self.weight_u.clone()
            v = self.weight_v.clone()
            sigma = torch.dot(u, torch.mv(matrix, v))
            return self.weight / torch.where(sigma.abs() > EPSILON, sigma, 1.0)

    @torch.no_grad()
    def buffers_from_weights(self) -> None:
        """Adapt u and v by 15 power iterations.

        Use this for weights that no training step produced, such as averaged ones.
        """
        for _ in range(POWER_ITERATIONS):
            self._iterate(self.weight.flatten(1))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self.weight_v.copy_(_direction(torch.mv(matrix.mT, self.weight_u), self.weight_v))
        self.weight_u.copy_(_direction(torch.mv(matrix, self.weight_v), self.weight_u))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Translate the key names of PyTorch's two spectral norms; see the class."""
        for name, old_names in _OLD_NAMES.items():
            for wrapper in ("", "conv."):
                for old_name in (*old_names, name):
                    key = prefix + wrapper + old_name
                    if prefix + name not in state_dict and key in state_dict:
                        state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _direction(vector: Tensor, fallback: Tensor) -> Tensor:
    """`vector / |vector|`; `fallback` where the vector is zero."""
    norm = torch.linalg.vector_norm(vector)
    return torch.where(norm > EPSILON, vector / norm.clamp_min(EPSILON), fallback)
