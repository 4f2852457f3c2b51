"""ConvNorm: convolutions whose output channels are preconditioned in the frequency domain.

Sheng Liu, Xiao Li, Yuexiang Zhai, Chong You, Zhihui Zhu, Carlos Fernandez-Granda, Qing Qu:
"Convolutional Normalization: Improving Deep Convolutional Network Robustness and Training", NeurIPS
2021, arXiv:2103.00673, section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import pi
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dft_filter import dft_filter, dft_filter_is_faster
from .fourier_convolution import fourier_convolution
from .fourier_plan import plan_for_layer
from .full_convolution import full_convolution
from .kept_inverse_root import KeptInverseRoot
from .kernel_energy import inverse_root_energy
from .recomputation import NARROW, recomputed_batch_norm
from .spectral_filter import spectral_filter

RAMPDOWN_STEPS = 40000
"""Training steps over which the weight of the newest V in `running_V` falls from 1 to `MIN_FACTOR`
along a cosine.
"""

MIN_FACTOR = 0.01


class ConvNorm2d(nn.Conv2d):
    """Convolution whose output channels are divided by the spectra of their kernels, then a
    depthwise affine map and batch norm.

    For an input `x` `(B, C_in, H, W)` and a weight `w`, with `S = H + dilation * (k - 1)` per axis
    (more if `padding` exceeds `dilation * (k - 1)`, or if `padding_mode` is not zeros):

    1. full convolution at stride 1, `z = w * x + bias`, `(B, C_out, S_h, S_w)`;
    2. filter, `z <- IDFT(V . DFT(z))` with `V = 1 / sqrt(sum_c |w^_c(f)|^2)` per output channel and
       frequency f, where `w^_c` is the DFT of the kernel for input channel c. V is a constant for
       the gradient (the paper's "stop gradient"). Each channel's operator, as a circular
       convolution on the `S_h x S_w` grid, then has orthonormal rows;
    3. crop to the size that `padding` gives, and keep every `stride`-th row and column;
    4. affine map `bpconv`, a depthwise convolution with the same kernel size and a bias (if
       `affine`);
    5. `batch_norm` (if `bn`).

    The output has the shape of `nn.Conv2d`'s. For a 1x1 kernel V is one number per channel, and no
    transform is made.

    Train and eval: in training V comes from the weights, and `running_V` follows it, `running_V <-
    f V + (1 - f) running_V`. The factor f is `momentum`; if that is None, it is `max(cosine
    ramp-down over 40000 steps, 0.01)`. In eval V is `running_V`. Where that was never set or
    belongs to another input size, V comes from the weights in eval, too.

    Precision: also under autocast, V is computed in float64 (float32 on MPS), and the FFT runs in
    float32 at least. Where a CPU replaces the FFT by products with DFT matrices, these run in the
    convolution's own precision (see `fourier_convolution` and `dft_filter`).

    State: `weight, bias, running_V, num_batches_tracked, bpconv.*, batch_norm.*`. `running_V`
    begins as one zero and takes its real size in the first training step. The buffer object stays
    the same, as DistributedDataParallel needs it.

    Deviations from the original: the energy has a floor (see `inverse_root_energy`); the step
    counter is saved; a change of input size restarts `running_V` instead of failing; `padding` may
    exceed the kernel, be `"same"`, or use another mode; dilation, groups and non-square kernels
    work; an even kernel's `bpconv` keeps the size instead of losing a row and a column.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`.
        affine: whether there is a `bpconv`, and whether `batch_norm` is affine.
        bn: whether a `batch_norm` follows.
        momentum: the constant factor f in (0, 1]; None for the ramp-down.
        track_running_stats: False leaves `running_V` as it is and takes V from the weights in eval,
            too.

    Raises:
        ValueError: the input is not `(B, C_in, H, W)`, or with its padding it is smaller than the
            kernel.
    """

    # Properties that the trainer's layer tables read from a layer's class.
    normalizes: ClassVar = True
    normalizes_weights: ClassVar = True
    batch_statistics: ClassVar = True
    buffers_follow_weights: ClassVar = True

    running_V: Tensor  # noqa: N815 - the original's name, a key of its checkpoints
    num_batches_tracked: Tensor

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
        affine: bool = True,
        bn: bool = True,
        momentum: float | None = None,
        track_running_stats: bool = True,
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
        self.affine = affine
        self.bn = bn
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.register_buffer("running_V", torch.zeros(1))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.bpconv: nn.Module = nn.Identity()
        if affine:
            half = tuple((k - 1) // 2 for k in self.kernel_size)
            self.bpconv = nn.Conv2d(
                out_channels, out_channels, self.kernel_size, padding=half, groups=out_channels
            )
        if bn:
            self.batch_norm = nn.BatchNorm2d(out_channels, affine=affine)
        self._kept: KeptInverseRoot | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, with H' and W' as in `nn.Conv2d`."""
        # nn.Conv2d takes a single image without a batch dimension, batch norm does not
        if input.dim() != 4:
            raise ValueError(f"expected images (B, C, H, W), not the shape {tuple(input.shape)}")
        plan = plan_for_layer(self, input)
        # One name for the result of every step, so that each is freed once the next exists.
        if self.kernel_size == (1, 1):
            # V is the same number at every frequency: it scales the kernel instead of the output.
            z = self._scaled_pointwise(input)
        elif plan is not None:
            # On a CPU, products with small DFT matrices give steps 1 to 3 in less time, where
            # there are enough channels.
            inverse_root = self._inverse_root(plan.size)
            z = fourier_convolution(input, self.weight, self.bias, inverse_root, plan)
        else:
            # 1. full convolution, z = w * x + bias
            z, (rows, columns) = self._full_convolution(input)
            inverse_root = self._inverse_root(z.shape[-2:])
            # 2. and 3. filter, z <- IDFT(V . DFT(z)), crop and stride
            if dft_filter_is_faster(z):
                z = dft_filter(z, inverse_root, rows, columns)
            else:
                z = spectral_filter(z, inverse_root, rows, columns)
        # 4. affine map, a depthwise convolution
        if self.affine:
            z = self._pad_for_even_kernel(z)
            # Training keeps less memory where step 5 recomputes its input. A compiler decides
            # itself what it recomputes, and it cannot trace the hooks that this takes.
            # On a CPU, narrow layers keep this input to save time: see `NARROW`.
            keeps = self.out_channels < NARROW and z.device.type == "cpu"
            recomputes = self.bn and self.training and not keeps
            if recomputes and not torch.compiler.is_compiling():
                return recomputed_batch_norm(z, self.bpconv, self.batch_norm)
            z = self.bpconv(z)
        # 5. batch norm
        if self.bn:
            z = self.batch_norm(z)
        return z

    def linear_part(self) -> "ConvNorm2d":
        """A copy of the layer in evaluation mode with only its steps 1 to 3 and no bias: a linear
        map of its inputs.

        No parameter of the copy needs a gradient. Callers recognize the layer by this method,
        because the package may be imported under two names.
        """
        layer = deepcopy(self).eval().requires_grad_(False)
        layer.affine = False
        layer.bn = False
        layer.bias = None
        return layer

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Within the context V is computed from the weights once, and kept from one forward pass to
        the next; `running_V` follows it in every training pass as before.

        For passes between which the weights stay the same, such as those of an attack: weights that
        require gradients have their V computed in every pass. Changes in place are noticed, except
        those through `weight.data` and by fused optimizers. A compiled network keeps nothing.
        """
        outermost = self._kept is None
        if outermost:
            self._kept = KeptInverseRoot(self.weight)
        try:
            yield
        finally:
            if outermost:
                self._kept = None

    @torch.no_grad()
    def buffers_from_weights(self) -> None:
        """Forget `running_V`, so that V comes from the weights.

        For weights that no training step has made, such as averaged ones.
        """
        self.running_V.data = torch.zeros_like(self.running_V.flatten()[:1])

    def _scaled_pointwise(self, input: Tensor) -> Tensor:
        # A copy, because in evaluation V is a buffer that a later training step changes in place.
        scale = self._inverse_root((1, 1)).to(self.weight.dtype, copy=True)
        weight = self.weight * scale.unsqueeze(-1)
        bias = None
        if self.bias is not None:
            bias = self.bias * scale.flatten()
        return self._conv_forward(input, weight, bias)

    def _full_convolution(self, input: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
        """`w * x + bias` at stride 1, `(B, C_out, S_h, S_w)`, and which rows and columns of it the
        layer keeps.
        """
        input_size = tuple(input.shape[-2:])
        extent = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        before, after = self._padding_per_side(extent)
        if self.padding_mode != "zeros":
            # Nonzero padding is part of the signal, so it comes before step 1.
            margins = (before[1], after[1], before[0], after[0])
            input = F.pad(input, margins, mode=self.padding_mode)
            before = after = (0, 0)
        # With `extent` zeros on each side the convolution is full: it holds every nonzero output. A
        # larger padding adds the zeros that the user asked for.
        padding = [max(sides) for sides in zip(before, after, extent, strict=True)]
        full = full_convolution(input, self.weight, self.bias, padding, self.dilation, self.groups)
        first = [p - b for p, b in zip(padding, before, strict=True)]
        last = [s - p + a for s, p, a in zip(full.shape[-2:], padding, after, strict=True)]
        if first[0] >= last[0] or first[1] >= last[1]:
            raise ValueError(
                f"input {input_size} with its padding is smaller than the kernel {self.kernel_size}"
            )
        rows, columns = (slice(*ends) for ends in zip(first, last, self.stride, strict=True))
        return full, (rows, columns)

    def _pad_for_even_kernel(self, input: Tensor) -> Tensor:
        # At half padding, `bpconv` with an even kernel would lose the last row or column.
        even_h, even_w = (1 - k % 2 for k in self.kernel_size)
        if even_h or even_w:
            input = F.pad(input, (0, even_w, 0, even_h))
        return input

    def _padding_per_side(self, extent: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding `(top, left)` and `(bottom, right)`."""
        if isinstance(self.padding, tuple):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0, 0), (0, 0)
        # "same": an odd pixel goes to the end, as in nn.Conv2d.
        before = (extent[0] // 2, extent[1] // 2)
        return before, (extent[0] - before[0], extent[1] - before[1])

    @torch.no_grad()
    def _inverse_root(self, size: tuple[int, int]) -> Tensor:
        """V for this forward pass, `(C_out, S_h, S_w // 2 + 1)`; in training it also advances
        `running_V`.
        """
        shape = (self.out_channels, size[0], size[1] // 2 + 1)
        if self.track_running_stats and not self.training and self.running_V.shape == shape:
            return self.running_V
        if torch.compiler.is_compiling() or self._kept is None:
            inverse_root = inverse_root_energy(self.weight, size, self.dilation)
        else:
            inverse_root = self._kept.inverse_root(self.weight, size, self.dilation)
        if self.track_running_stats and self.training:
            self._update_running_v(inverse_root.to(self.running_V.dtype))
        return inverse_root

    def _update_running_v(self, newest: Tensor) -> None:
        # The counter advances before the factor is taken, as in the original.
        self.num_batches_tracked.add_(1)
        if self.running_V.shape == newest.shape:
            factor = self.momentum
            if factor is None:
                factor = self._rampdown()
            self.running_V.lerp_(newest, factor)
        else:
            # The buffer stays the same object at another size. A compiler follows an assignment to
            # `data`, but not `resize_`. The clone is needed because the next update must not change
            # the V of this pass.
            self.running_V.data = newest.clone()

    def _rampdown(self) -> Tensor:
        """The cosine ramp-down (arXiv:1608.03983) at the current step."""
        # A tensor, because reading the counter would make the CPU wait for a GPU.
        steps = self.num_batches_tracked.clamp(max=RAMPDOWN_STEPS)
        progress = steps.to(self.running_V.dtype) / RAMPDOWN_STEPS
        return (0.5 * (torch.cos(pi * progress) + 1)).clamp_min(MIN_FACTOR)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a `running_V` of any size, and count from 0 where there is no counter, as in the
        original's checkpoints.
        """
        stored = state_dict.get(prefix + "running_V")
        if isinstance(stored, Tensor) and stored.shape != self.running_V.shape:
            self.running_V.resize_(stored.shape)
        counter = prefix + "num_batches_tracked"
        if counter not in state_dict:
            # This changes a copy: nn.Module.load_state_dict copies the caller's dictionary.
            state_dict[counter] = torch.zeros((), dtype=torch.int64)
        super()._load_from_state_dict(state_dict, prefix, *args)
