"""ConvNorm: convolutions whose output channels are preconditioned in the frequency domain.

Sheng Liu, Xiao Li, Yuexiang Zhai, Chong You, Zhihui Zhu, Carlos Fernandez-Granda, Qing Qu:
"Convolutional Normalization: Improving Deep Convolutional Network Robustness and Training", NeurIPS
2021, arXiv:2103.00673."""

from collections.abc import Callable
from copy import deepcopy
from math import pi
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fourier_convolution import fourier_convolution
from .fourier_plan import Axis, Plan, plan_for
from .kernel_energy import inverse_root_energy
from .precision import without_autocast

RAMPDOWN_STEPS = 40000
"""Training steps over which the weight of the newest spectrum in `running_V` falls from 1 to
`MIN_FACTOR` along a cosine."""

MIN_FACTOR = 0.01
FOURIER_BATCH = 16
"""Images from which on the Fourier domain is faster on a CPU. Evaluation fills its batches up to as
many."""

FOURIER_SIZE = 50
"""Side of the largest image that matrices transform: their cost grows with its third power, an
FFT's with the second."""


class _Filter(torch.autograd.Function):
    """`signal` `(..., S_h, S_w) -> IDFT(V . DFT(signal))` with a real V `(..., S_h, S_w // 2 + 1)`.

    A filter with a real spectrum is its own adjoint, so the backward pass is the forward pass on
    the gradient. PyTorch's own gradient of a half-spectrum transform runs a complex transform of
    the whole spectrum instead."""

    @staticmethod
    def forward(signal: Tensor, inverse_root: Tensor) -> Tensor:
        # the product on real and imaginary parts: half the work of a complex product
        spectrum = torch.view_as_real(torch.fft.rfft2(signal)) * inverse_root.unsqueeze(-1)
        return torch.fft.irfft2(torch.view_as_complex(spectrum), s=signal.shape[-2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Filter.apply(grad, *ctx.saved_tensors), None


class ConvNorm2d(nn.Conv2d):
    """Convolution, division by the spectral norm of its own kernels at every frequency, depthwise
    affine map, batch norm.

    For input `x` `(B, C_in, H, W)` and weight `w`, with `S = H + dilation * (k - 1)` per axis:

    1. `z = w * x + bias`, the full convolution (stride 1), `(B, C_out, S_h, S_w)`;
    2. `z <- IDFT(V . DFT(z))` with `V = 1 / sqrt(sum_c |w^_c(f)|^2)` per output channel and
    frequency, a constant for the
       gradient (the paper's "stop gradient"): each channel's convolution operator then has
       orthonormal rows;
    3. crop to the size that `padding` asks for, keep every `stride`-th row and column;
    4. `bpconv`, a depthwise convolution with the same kernel size and a bias (if `affine`);
    5. `batch_norm` (if `bn`).

    The output has the shape of `nn.Conv2d`'s. For a 1x1 kernel V is one number per channel and no
    transform is made.

    Train and eval: in training V comes from the weights, and `running_V` follows it, `running_V <-
    f V + (1 - f) running_V` with `f = momentum`, or, where that is None, `f = max(cosine ramp-down
    of the step over 40000 steps, 0.01)`. In eval V is `running_V`; where that was never set or
    belongs to another input size, V comes from the weights. The transform runs in float32 at least,
    also under autocast.

    State: `weight, bias, running_V, num_batches_tracked, bpconv.*, batch_norm.*`. `running_V`
    begins as one zero and takes its real size in the first training step; the buffer object stays
    the same, as DistributedDataParallel needs it.

    Deviations from the original: E has a floor (see `inverse_root_energy`); the step counter is
    saved; a change of input size restarts `running_V` instead of failing; `padding` may exceed the
    kernel, be `"same"`, or use another mode; dilation, groups and non-square kernels work; an even
    kernel's `bpconv` keeps the size instead of losing a row and a column.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in `nn.Conv2d`.
        affine: whether there is a `bpconv`, and whether `batch_norm` is affine.
        bn: whether a `batch_norm` follows.
        momentum: the constant factor f in (0, 1]; None for the ramp-down.
        track_running_stats: False keeps `running_V` untouched and takes V from the weights in eval,
            too.

    Raises:
        ValueError: the padded input is smaller than the kernel.
    """

    # what this project's tables ask of a layer
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

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, with H' and W' as in `nn.Conv2d`."""
        if self.kernel_size == (1, 1):
            output = self._scaled_pointwise(input)
        else:
            plan = self._plan(input)
            if plan is None:
                output = self._preconditioned(input, self.weight, self.bias, self._inverse_root)
            else:
                output = self._in_fourier_domain(input, plan)
        if self.affine:
            even_h, even_w = (1 - k % 2 for k in self.kernel_size)
            if even_h or even_w:
                output = F.pad(output, (0, even_w, 0, even_h))
            if self.bn and self.training and not torch.compiler.is_compiling():
                return self._normalized_again(output)
            output = self.bpconv(output)
        return self.batch_norm(output) if self.bn else output

    def linear_part(self) -> "ConvNorm2d":
        """A copy of the layer in evaluation mode that makes its steps 1 to 3 without the bias: a
        linear map of its inputs.

        Nothing in it needs a gradient. Callers recognize the layer by this method, whatever name
        its package is imported under."""
        layer = deepcopy(self).eval().requires_grad_(False)
        layer.affine = layer.bn = False
        layer.bias = None
        return layer

    def _normalized_again(self, input: Tensor) -> Tensor:
        """`batch_norm(bpconv(input))` that keeps `input` only for the backward pass, and computes
        what is between the two once more: a depthwise convolution takes little time, its output as
        much memory as the layer's."""
        output = self.bpconv(input)
        place, shape, dtype = output.data_ptr(), output.shape, output.dtype

        def keep(tensor: Tensor) -> Tensor | None:
            return (
                None
                if (tensor.data_ptr(), tensor.shape, tensor.dtype) == (place, shape, dtype)
                else tensor
            )

        def restore(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            with torch.no_grad(), without_autocast(input):
                weight, bias = (
                    parameter.to(dtype) for parameter in (self.bpconv.weight, self.bpconv.bias)
                )
                return F.conv2d(
                    input.to(dtype),
                    weight,
                    bias,
                    padding=self.bpconv.padding,
                    groups=self.bpconv.groups,
                )

        with torch.autograd.graph.saved_tensors_hooks(keep, restore):
            return self.batch_norm(output)

    def _plan(self, input: Tensor) -> Plan | None:
        """How to compute the layer in the Fourier domain; None where that is impossible or slower:
        on a GPU, for small batches (the kernels' spectra take their time whatever the batch), for
        large images, and under a compiler, which cannot look inside."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if (
            # asked first: an exported network takes any batch unless its size is asked for
            torch.compiler.is_compiling()
            or input.device.type != "cpu"
            or len(input) < FOURIER_BATCH
            or max(input.shape[-2:]) > FOURIER_SIZE
            or dtype not in (torch.float32, torch.bfloat16)
            or self.groups > 1
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
        ):
            return None
        axes = zip(
            input.shape[-2:],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return plan_for(*(Axis(*axis) for axis in axes), dtype, input.device)

    def _in_fourier_domain(self, input: Tensor, plan: Plan) -> Tensor:
        inverse_root = self._inverse_root((plan.rows.size, plan.columns.size))

        def plain(input: Tensor, weight: Tensor) -> Tensor:
            return self._preconditioned(input, weight, None, lambda size: inverse_root)

        output = fourier_convolution(input, self.weight, inverse_root, plan, plain)
        if self.bias is None:
            return output
        # a constant: V at frequency 0
        return output + (self.bias * inverse_root[:, 0, 0]).to(output.dtype).reshape(-1, 1, 1)

    def _scaled_pointwise(self, input: Tensor) -> Tensor:
        scale = self._inverse_root((1, 1)).to(self.weight.dtype)
        bias = None if self.bias is None else self.bias * scale.flatten()
        return self._conv_forward(input, self.weight * scale.unsqueeze(-1), bias)

    def _preconditioned(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inverse_root_of: Callable[[tuple[int, int]], Tensor],
    ) -> Tensor:
        extent = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        before, after = self._padding_per_side(extent)
        if self.padding_mode != "zeros":
            input = F.pad(input, (before[1], after[1], before[0], after[0]), mode=self.padding_mode)
            before = after = (0, 0)
        # a full convolution holds every nonzero output; a larger padding only adds the zeros that
        # were asked for
        padding = [max(sides) for sides in zip(before, after, extent, strict=True)]
        full = F.conv2d(input, weight, bias, 1, padding, self.dilation, self.groups)
        size = (full.shape[-2], full.shape[-1])
        first = [p - b for p, b in zip(padding, before, strict=True)]
        last = [s - p + a for s, p, a in zip(size, padding, after, strict=True)]
        if first[0] >= last[0] or first[1] >= last[1]:
            raise ValueError(
                f"input {tuple(input.shape[-2:])} with its padding is smaller than the kernel {self.kernel_size}"
            )
        signal = full if full.dtype == torch.float64 else full.float()
        filtered = _Filter.apply(signal, inverse_root_of(size).to(signal.dtype))
        return filtered[
            ..., first[0] : last[0] : self.stride[0], first[1] : last[1] : self.stride[1]
        ].to(full.dtype)

    def _padding_per_side(self, extent: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding `(top, left)` and `(bottom, right)`."""
        if isinstance(self.padding, tuple):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0, 0), (0, 0)
        before = (extent[0] // 2, extent[1] // 2)
        return before, (extent[0] - before[0], extent[1] - before[1])

    @torch.no_grad()
    def _inverse_root(self, size: tuple[int, int]) -> Tensor:
        """V for this forward pass, `(C_out, S_h, S_w // 2 + 1)`; in training it also advances
        `running_V`."""
        shape = (self.out_channels, size[0], size[1] // 2 + 1)
        if self.track_running_stats and not self.training and self.running_V.shape == shape:
            return self.running_V
        inverse_root = inverse_root_energy(self.weight, size, self.dilation)
        if self.track_running_stats and self.training:
            self.num_batches_tracked.add_(1)
            newest = inverse_root.to(self.running_V.dtype)
            if self.running_V.shape == shape:
                self.running_V.lerp_(
                    newest, self._newest_factor() if self.momentum is None else self.momentum
                )
            else:
                # another size in the same tensor object; a compiler follows this, but not resize_.
                # A copy, because this pass's V must outlive the next update
                self.running_V.data = newest.clone()
        return inverse_root

    @torch.no_grad()
    def buffers_from_weights(self) -> None:
        """Forget `running_V`, so that V comes from the weights: for weights that no training step
        has made (averages)."""
        self.running_V.data = torch.zeros_like(self.running_V.flatten()[:1])

    def _newest_factor(self) -> Tensor:
        """The cosine ramp-down (arXiv:1608.03983) at the current step, as a tensor: reading the
        counter would stall a GPU."""
        progress = (
            self.num_batches_tracked.clamp(max=RAMPDOWN_STEPS).to(self.running_V.dtype)
            / RAMPDOWN_STEPS
        )
        return (0.5 * (torch.cos(pi * progress) + 1)).clamp_min(MIN_FACTOR)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads a `running_V` of any size, and counts from 0 where there is no counter, as in the
        original's checkpoints."""
        stored = state_dict.get(prefix + "running_V")
        if isinstance(stored, Tensor) and stored.shape != self.running_V.shape:
            self.running_V.resize_(stored.shape)
        counter = prefix + "num_batches_tracked"
        if counter not in state_dict:
            # the caller's dict is not this one: it was copied
            state_dict[counter] = torch.zeros((), dtype=torch.int64)
        super()._load_from_state_dict(state_dict, prefix, *args)
