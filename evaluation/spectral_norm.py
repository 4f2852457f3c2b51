"""The singular values of convolutions as the linear maps that they are in a network: at their
input's size, with their zero padding and stride.

Let `A` be the matrix of a layer's linear part, M outputs by N inputs (`M = C_out H' W'`, `N = C_in
H W` for a convolution), with singular values `s_1 >= ... >= s_K`, `K = min(M, N)`. Inputs that
reach no output do not count in N: a 1x1 kernel at stride 2 skips three of four. `A` is never built:
`A x` is the layer's forward pass without its bias, `A^T y` its vector-Jacobian product. (Sedghi,
Gupta, Long, arXiv:1805.10408, have a closed form for circular padding and stride 1.)"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, log10, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from base.errors import NonFiniteError
from base.seeding import torch_generator
from evaluation.layer_trace import LayerCall, linear_calls

Operator = Callable[[Tensor], Tensor]
"""A linear map of batches `(B, ...) -> (B, ...)`, sample by sample."""

PROBES = 16
"""Random vectors for the orthogonality error; where K is at most four times that, it is computed
exactly."""

LEAST_ITERATIONS = 20
EXACT = 1e-12
"""A residual that ends the iteration at once: the vector lies in an invariant space to rounding."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of the singular values `s_1 >= ... >= s_K` of one operator.

    Attributes:
        norm: `s_1`, the spectral norm. As a Rayleigh quotient it is never above the true one.
        residual: `|A^T A v - s_1^2 v| / s_1^2` at the vector found; some singular value lies within
            that share of `norm`.
        iterations: how many were made.
        converged: whether the residual is within the tolerance.
        mean_square: `sum s_i^2 / K`, 1 for an orthogonal operator.
        orthogonality_error: `sqrt(sum (s_i^2 - 1)^2 / K) = |G - I|_F / sqrt(K)` with `G = A A^T` if
            `M <= N`, else `A^T A`: how far the rows, or where there are more rows than columns the
            columns, are from orthonormal. The other, larger Gram matrix has rank K and cannot be
            the identity, so this is well defined for every stride and number of channels.
        spread: the same of `A / sqrt(mean_square)`, the relative standard deviation of `s_i^2`: 0
            for every multiple of an orthogonal operator, so a scale that a batch norm takes away
            does not count.
    """

    norm: float
    residual: float
    iterations: int
    converged: bool
    mean_square: float
    orthogonality_error: float
    spread: float


@dataclass(frozen=True)
class LayerSpectrum:
    """A layer where a forward pass calls it, and its spectrum.

    Attributes:
        name: of the layer in its network.
        type: its class.
        input_shape: of one input, without the batch.
        spectrum: of its linear part.
        batch_norm_scale: see `LayerCall`.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    spectrum: Spectrum
    batch_norm_scale: float | None

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {
            "name": self.name,
            "type": self.type,
            "input_shape": list(self.input_shape),
            **asdict(self.spectrum),
            "batch_norm_scale": self.batch_norm_scale,
        }


@dataclass(frozen=True)
class NetworkSpectra:
    """The spectra of a network's layers.

    Attributes:
        layers: in the order of their calls.
        tolerance: of each `Spectrum.residual`.
        seed: of first vectors and probes.
    """

    layers: tuple[LayerSpectrum, ...]
    tolerance: float
    seed: int

    @property
    def log10_product_of_norms(self) -> float | None:
        """See `product_of_norms`."""
        return product_of_norms(layer.spectrum.norm for layer in self.layers)

    @property
    def log10_product_with_batch_norms(self) -> float | None:
        """The same, each norm times the scale of the batch norm behind the layer."""
        return product_of_norms(
            layer.spectrum.norm * (layer.batch_norm_scale or 1.0) for layer in self.layers
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {
            "tolerance": self.tolerance,
            "seed": self.seed,
            "log10_product_of_norms": self.log10_product_of_norms,
            "log10_product_with_batch_norms": self.log10_product_with_batch_norms,
            "layers": [layer.as_dict() for layer in self.layers],
        }


def layer_spectra(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    tolerance: float = 1e-4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> NetworkSpectra:
    """The spectra of all convolutions and linear layers of any network, at their inputs' sizes, in
    evaluation mode. Shows a progress bar on a terminal.

    Args:
        model: any network on images; left as it was.
        image_shape: `(C, H, W)`.
        tolerance: see `operator_spectrum`.
        seed: see `operator_spectrum`.
        dtype: what is computed in; float32 for devices without float64.

    Raises:
        NonFiniteError: a layer's weights are infinite or NaN; the message names it.
    """
    layers = []
    for call in tqdm(linear_calls(model, image_shape), desc="layers", disable=None, leave=False):
        spectrum = measure(call, tolerance=tolerance, seed=seed, dtype=dtype)
        kind = type(call.layer).__name__
        layers.append(
            LayerSpectrum(call.name, kind, call.input_shape, spectrum, call.batch_norm_scale)
        )
    return NetworkSpectra(tuple(layers), tolerance, seed)


def linear_part(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Operator:
    """The linear map in a convolution or linear layer in evaluation mode: its weight without its
    bias.

    A layer that does more than apply its weight offers a method `linear_part()`, which returns a
    module for the linear map, as `ConvNorm2d` does. A weight that the layer computes (spectral
    normalization, ONI, OWN) is computed in the layer's own precision, as in the network, and only
    then converted to `dtype`. The layer itself is left as it was; the map has no gradient for its
    weights.
    """
    if hasattr(layer, "linear_part"):
        return layer.linear_part().requires_grad_(False).to(dtype)
    layer = deepcopy(layer).eval().requires_grad_(False)
    weight = layer.normalized_weight() if hasattr(layer, "normalized_weight") else layer.weight
    weight = weight.detach().to(dtype)
    if isinstance(layer, nn.Linear):
        return partial(F.linear, weight=weight)
    return lambda inputs: layer._conv_forward(inputs, weight, None)


def measure(
    call: LayerCall,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Spectrum:
    """`operator_spectrum` of the linear part of a layer at its input's size, on the layer's device.

    Raises:
        NonFiniteError: the layer's weights are infinite or NaN; the message names it.
    """
    device = call.layer.weight.device
    try:
        return operator_spectrum(
            linear_part(call.layer, dtype),
            call.input_shape,
            tolerance=tolerance,
            max_iterations=max_iterations,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    except NonFiniteError:
        raise NonFiniteError(
            f"{call.name}: its weights or running statistics are infinite or NaN"
        ) from None


def operator_spectrum(
    operator: Operator,
    input_shape: tuple[int, ...],
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The spectrum of a linear operator that can only be applied.

    The norm comes from a power iteration on `A^T A`: each step takes the best vector in the span of
    the present one, its image and the last step (locally optimal, Knyazev 2001,
    doi:10.1137/S1064827500366124), where the plain iteration takes the image. The singular values
    of a convolution lie close together, and plain steps would be many more.

    The moments `sum s_i^2 = tr G` and `sum s_i^4 = |G|_F^2` come from Hutchinson's estimator, `z^T
    G z` and `|G z|^2` averaged over `PROBES` vectors of random signs; exactly, from unit vectors,
    where K is at most `4 * PROBES`.

    Args:
        operator: linear; its vector-Jacobian product is its adjoint.
        input_shape: of one input, without the batch.
        tolerance: of `Spectrum.residual`; that of `norm` is of second order, 1e-3 usually gives
            four digits. At least `LEAST_ITERATIONS` are made: a random vector in many dimensions
            has a small residual before it has found the largest of singular values that are nearly
            equal.
        max_iterations: at least 1.
        seed: of the first vector and the probes.
        dtype: float64 or float32, which the operator must take.
        device: of the operator's weights.

    Raises:
        NonFiniteError: the operator gives infinite values or NaN.
    """
    generator = torch_generator(seed, "operator norm")
    zeros = torch.zeros(1, *input_shape, dtype=dtype, device=device)
    output_shape = operator(zeros).shape[1:]
    inputs, outputs = zeros.numel(), output_shape.numel()

    def draw(count: int, size: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64).to(device, dtype)

    def forward(vectors: Tensor) -> Tensor:
        return operator(vectors.unflatten(1, input_shape)).flatten(1)

    def adjoint(vectors: Tensor) -> Tensor:
        point = zeros.expand(len(vectors), *input_shape)
        return torch.func.vjp(operator, point)[1](vectors.unflatten(1, output_shape))[0].flatten(1)

    norm, residual, iterations = _power_iteration(
        forward, adjoint, draw(1, inputs), tolerance, max_iterations
    )
    mean_square, mean_fourth, error = _moments(forward, adjoint, outputs, draw)
    return Spectrum(
        norm=norm,
        residual=residual,
        iterations=iterations,
        converged=residual <= tolerance,
        mean_square=mean_square,
        orthogonality_error=error,
        spread=sqrt(max(0.0, mean_fourth / mean_square**2 - 1)) if mean_square > 0 else 0.0,
    )


def product_of_norms(norms: Iterable[float]) -> float | None:
    """`log10` of the product; None where it is 0.

    The product of all layers' spectral norms bounds the Lipschitz constant (in l2) of a plain chain
    of them with 1-Lipschitz activations and poolings between. Of a residual network it is no bound:
    there branches add, and a shortcut's norm is among the factors."""
    norms = list(norms)
    return sum(map(log10, norms)) if all(norms) else None


def _power_iteration(
    forward: Operator, adjoint: Operator, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[float, float, int]:
    """Norm, residual and number of iterations, from `start` `(1, N)`; see `operator_spectrum`."""
    vector, last_step = start / torch.linalg.vector_norm(start), None
    for iteration in range(1, max_iterations + 1):
        image = forward(vector)
        square = float(image.square().sum())
        if not isfinite(square):
            raise NonFiniteError("the operator gives infinite values or NaN")
        gradient = adjoint(image) - square * vector
        residual = float(torch.linalg.vector_norm(gradient)) / square if square > 0 else 0.0
        if (
            residual <= (tolerance if iteration >= LEAST_ITERATIONS else EXACT)
            or iteration == max_iterations
        ):
            break
        basis = vector
        for direction in (gradient, last_step):
            if direction is not None:
                basis = _extended(basis, direction)
        images = torch.cat([image, forward(basis[1:])])
        best = torch.linalg.eigh(images @ images.mT).eigenvectors[:, -1:].mT
        last_step = best[:, 1:] @ basis[1:]
        vector = best @ basis
        vector = vector / torch.linalg.vector_norm(vector)
    return sqrt(square), residual, iteration


def _extended(basis: Tensor, direction: Tensor) -> Tensor:
    """Orthonormal rows with one more in the direction `(1, N)`; as they were, where it adds nothing
    to their span."""
    length = torch.linalg.vector_norm(direction)
    for _ in range(2):  # once is not orthogonal enough where little remains
        direction = direction - direction @ basis.mT @ basis
    rest = torch.linalg.vector_norm(direction)
    return torch.cat([basis, direction / rest]) if rest > 1e-6 * length else basis


def _moments(
    forward: Operator, adjoint: Operator, outputs: int, draw: Callable[[int, int], Tensor]
) -> tuple[float, float, float]:
    """`tr G / K`, `|G|_F^2 / K` and `|G - I|_F / sqrt(K)` of the smaller Gram matrix G, from probes
    z of the dimensions that count, over which the mean of `z z^T` is the identity."""
    reached = adjoint(draw(1, outputs))[0] != 0
    by_rows = outputs <= int(reached.sum()) or not reached.any()
    counted = torch.ones(outputs, dtype=torch.bool, device=reached.device) if by_rows else reached
    size = int(counted.sum())
    signs = draw(PROBES, len(counted)).sign()
    probes = (
        sqrt(size) * torch.diag(counted.to(signs.dtype))[counted]
        if size <= 4 * PROBES
        else signs * counted
    )
    sums = torch.zeros(3, dtype=torch.float64)
    for some in probes.split(4):
        product = forward(adjoint(some)) if by_rows else adjoint(forward(some))
        sums += torch.stack(
            [(some * product).sum(), product.square().sum(), (product - some).square().sum()]
        ).cpu()
    first, second, error = (sums / (len(probes) * size)).tolist()
    return first, second, sqrt(error)
