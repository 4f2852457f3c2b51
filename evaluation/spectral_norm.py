"""Singular values of layers as the linear maps that they are in a network: at their input's size,
with their zero padding and stride.

Let `A` be the matrix of a layer's linear part, M outputs by N inputs, with singular values
`s_1 >= ... >= s_K`, `K = min(M, N)`. For a convolution `M = C_out H' W'` and `N = C_in H W`. Inputs
that reach no output do not count in N: a 1x1 kernel at stride 2 skips three of four. `A` is never
built: `A x` is the layer's forward pass without its bias, `A^T y` its vector-Jacobian product.
(Sedghi, Gupta, Long, arXiv:1805.10408, have a closed form for circular padding and stride 1.)
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, log10, sqrt
from statistics import pvariance
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

# Random vectors for the orthogonality error; if K is at most four times as large, it is computed
# exactly.
PROBES = 16

# A random vector in many dimensions has a small residual before it has found the largest of
# singular values that are nearly equal.
LEAST_ITERATIONS = 20

# A residual that ends the iteration at once: the vector lies in an invariant space to rounding.
EXACT = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """Statistics of the singular values `s_1 >= ... >= s_K` of one operator.

    Attributes:
        norm: `s_1`, the spectral norm. As a Rayleigh quotient it is never above the true one.
        residual: `|A^T A v - s_1^2 v| / s_1^2` at the vector found; some singular value lies within
            that share of `norm`.
        iterations: the number of iterations.
        converged: whether the residual is within the tolerance.
        mean_square: `sum s_i^2 / K`, 1 for an orthogonal operator.
        orthogonality_error: `sqrt(sum (s_i^2 - 1)^2 / K) = |G - I|_F / sqrt(K)` with `G = A A^T` if
            `M <= N`, else `A^T A`: how far the rows (the columns, if there are more rows) are from
            orthonormal. The other, larger Gram matrix has rank K and cannot be the identity, so
            this is well defined for every stride and number of channels.
        spread: the orthogonality error of `A / sqrt(mean_square)`, which is the relative standard
            deviation of `s_i^2`: 0 for every multiple of an orthogonal operator, so a scale that a
            batch norm takes away does not count.
        standard_errors: those of `mean_square`, `orthogonality_error` and `spread`, by name, where
            these are estimates; None where they are exact.
    """

    norm: float
    residual: float
    iterations: int
    converged: bool
    mean_square: float
    orthogonality_error: float
    spread: float
    standard_errors: Mapping[str, float] | None


@dataclass(frozen=True)
class LayerSpectrum:
    """One call of a layer in a forward pass, and the layer's spectrum.

    Attributes:
        name: the name of the layer in its network.
        type: the name of its class.
        input_shape: the shape of one input, without the batch.
        spectrum: the spectrum of its linear part.
        batch_norm_scale: see `LayerCall`.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    spectrum: Spectrum
    batch_norm_scale: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
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
        tolerance: the tolerance of each `Spectrum.residual`.
        seed: the seed of first vectors and probes.
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
        """See `product_of_norms`; each norm times the scale of the batch norm behind the layer."""
        norms = []
        for layer in self.layers:
            scale = layer.batch_norm_scale
            norms.append(layer.spectrum.norm * (1.0 if scale is None else scale))
        return product_of_norms(norms)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
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
    """Return the spectra of all convolutions and linear layers of any network, at their inputs'
    sizes, in evaluation mode. Shows a progress bar on a terminal.

    Args:
        model: any network on images; left as it was.
        image_shape: `(C, H, W)`.
        tolerance: see `operator_spectrum`.
        seed: see `operator_spectrum`.
        dtype: the type of the computation; float32 for devices without float64.

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
    """Return the linear map of a convolution or linear layer in evaluation mode: its weight without
    its bias.

    A layer that does more than apply its weight offers a method `linear_part()`, which returns a
    module for the linear map, as `ConvNorm2d` does. A weight that the layer computes (spectral
    normalization, ONI, OWN) is computed in the layer's own precision, as in the network, and only
    then converted to `dtype`. The layer itself is left as it was; the map has no gradient for its
    weights.
    """
    if hasattr(layer, "linear_part"):
        return layer.linear_part().requires_grad_(False).to(dtype)
    # A copy in evaluation mode: in training mode spectral normalization would move its vectors.
    layer = deepcopy(layer).eval().requires_grad_(False)
    weight = layer.weight
    if hasattr(layer, "normalized_weight"):
        weight = layer.normalized_weight()
    weight = weight.detach().to(dtype)
    if isinstance(layer, nn.Linear):
        return partial(F.linear, weight=weight)
    # torch's own forward pass of a convolution, with its stride, padding and padding mode
    return lambda inputs: layer._conv_forward(inputs, weight, None)


def measure(
    call: LayerCall,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Spectrum:
    """Return the spectrum of the linear part of a layer at its input's size, on the layer's device.

    Args:
        call: the layer and its input's size.
        tolerance, max_iterations, seed, dtype: see `operator_spectrum`.

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
    """Return the spectrum of a linear operator that can only be applied.

    The norm comes from a power iteration on `A^T A`. The plain iteration continues with the image
    of the current vector; this one takes the best vector in the span of the current vector, its
    image and the last step (locally optimal, Knyazev 2001, doi:10.1137/S1064827500366124). The
    singular values of a convolution lie close together, and the plain iteration would take many
    more steps.

    The moments `sum s_i^2 = tr G` and `sum s_i^4 = |G|_F^2` come from Hutchinson's estimator: the
    averages of `z^T G z` and `|G z|^2` over `PROBES` vectors of random signs. If K is at most
    `4 * PROBES`, they are computed exactly, from unit vectors. The standard errors of what is made
    of the averages are the jackknife's: they come from its values without each of the vectors.

    Args:
        operator: linear; its vector-Jacobian product is its adjoint.
        input_shape: the shape of one input, without the batch.
        tolerance: the tolerance of `Spectrum.residual`. The error of `norm` is of second order:
            1e-3 usually gives four digits. At least `LEAST_ITERATIONS` are made.
        max_iterations: at least 1.
        seed: the seed of the first vector and the probes.
        dtype: float64 or float32, which the operator must take.
        device: the device of the operator's weights.

    Raises:
        NonFiniteError: the operator gives infinite values or NaN.
    """
    generator = torch_generator(seed, "operator norm")
    zeros = torch.zeros(1, *input_shape, dtype=dtype, device=device)
    output_shape = operator(zeros).shape[1:]

    def draw(count: int, size: int) -> Tensor:
        # In float64 on the CPU, so that every dtype and device gets the same vectors
        return torch.randn(count, size, generator=generator, dtype=torch.float64).to(device, dtype)

    def forward(vectors: Tensor) -> Tensor:
        return operator(vectors.unflatten(1, input_shape)).flatten(1)

    def adjoint(vectors: Tensor) -> Tensor:
        # The vector-Jacobian product of a linear map is its adjoint, at every point.
        point = zeros.expand(len(vectors), *input_shape)
        product = torch.func.vjp(operator, point)[1]
        return product(vectors.unflatten(1, output_shape))[0].flatten(1)

    norm, residual, iterations = _power_iteration(
        forward, adjoint, draw(1, zeros.numel()), tolerance, max_iterations
    )
    moments, exact = _moments(forward, adjoint, output_shape.numel(), draw)
    statistics = _statistics(moments.mean(0))
    standard_errors = None
    if not exact:
        standard_errors = _standard_errors(moments)
    return Spectrum(
        norm=norm,
        residual=residual,
        iterations=iterations,
        converged=residual <= tolerance,
        **statistics,
        standard_errors=standard_errors,
    )


def product_of_norms(norms: Iterable[float]) -> float | None:
    """Return `log10` of the product of all norms; None if it is 0.

    The product of all layers' spectral norms bounds the Lipschitz constant (in l2) of a plain chain
    of layers with 1-Lipschitz activations and poolings between them. It does not bound that of a
    residual network, whose branches add, and where a shortcut's norm is among the factors.
    """
    norms = list(norms)
    if 0 in norms:
        return None
    # A sum of logarithms: the product of many norms overflows
    return sum(map(log10, norms))


def _power_iteration(
    forward: Operator, adjoint: Operator, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[float, float, int]:
    """Return norm, residual and number of iterations, from `start` `(1, N)`; see
    `operator_spectrum`."""
    vector = start / torch.linalg.vector_norm(start)
    last_step = None
    for iteration in range(1, max_iterations + 1):
        image = forward(vector)
        square = float(image.square().sum())
        if not isfinite(square):
            raise NonFiniteError("the operator gives infinite values or NaN")
        # The gradient of the Rayleigh quotient, up to a factor
        gradient = adjoint(image) - square * vector
        residual = 0.0
        if square > 0:
            residual = float(torch.linalg.vector_norm(gradient)) / square
        enough = tolerance
        if iteration < LEAST_ITERATIONS:
            enough = EXACT
        if residual <= enough or iteration == max_iterations:
            break
        basis = vector
        for direction in (gradient, last_step):
            if direction is not None:
                basis = _extended(basis, direction)
        # Rayleigh-Ritz: the best vector in the span is an eigenvector of this small Gram matrix.
        images = torch.cat([image, forward(basis[1:])])
        best = torch.linalg.eigh(images @ images.mT).eigenvectors[:, -1:].mT
        last_step = best[:, 1:] @ basis[1:]
        vector = best @ basis
        vector = vector / torch.linalg.vector_norm(vector)
    return sqrt(square), residual, iteration


def _extended(basis: Tensor, direction: Tensor) -> Tensor:
    """Return the orthonormal rows of `basis` and one more, for the `direction` `(1, N)`; or `basis`
    itself if the direction lies in its span."""
    length = torch.linalg.vector_norm(direction)
    # Twice: once is not orthogonal enough if the direction lies nearly in the span.
    for _ in range(2):
        direction = direction - direction @ basis.mT @ basis
    rest = torch.linalg.vector_norm(direction)
    if rest <= 1e-6 * length:
        return basis
    return torch.cat([basis, direction / rest])


def _moments(
    forward: Operator, adjoint: Operator, outputs: int, draw: Callable[[int, int], Tensor]
) -> tuple[Tensor, bool]:
    """Return values `(probes, 3)` whose means over the probes are `tr G / K`, `|G|_F^2 / K` and
    `|G - I|_F^2 / K` of the smaller Gram matrix, and whether these means are exact.

    The probes z have the dimensions that count; the mean of `z z^T` is the identity.
    """
    # Inputs that reach an output have a gradient. Those that do not are not counted in N.
    reached = adjoint(draw(1, outputs))[0] != 0
    by_rows = outputs <= int(reached.sum()) or not reached.any()
    counted = reached
    if by_rows:
        counted = torch.ones(outputs, dtype=torch.bool, device=reached.device)
    size = int(counted.sum())
    signs = draw(PROBES, len(counted)).sign()
    probes = signs * counted
    exact = size <= 4 * PROBES
    if exact:
        # All unit vectors, scaled so that the mean of z z^T is the identity: exact.
        probes = sqrt(size) * torch.diag(counted.to(signs.dtype))[counted]
    values = []
    # A few probes at a time: each is as large as the layer's output
    for some in probes.split(4):
        product = forward(adjoint(some)) if by_rows else adjoint(forward(some))
        trace = (some * product).sum(1)
        square = product.square().sum(1)
        error = (product - some).square().sum(1)
        values.append(torch.stack([trace, square, error], dim=1).cpu().double())
    return torch.cat(values) / size, exact


def _statistics(moments: Tensor) -> dict[str, float]:
    """Return the fields of `Spectrum` that the three means of `_moments` decide."""
    mean_square, mean_fourth, squared_error = moments.tolist()
    spread = 0.0
    if mean_square > 0:
        # Rounding can make the variance of equal singular values negative.
        spread = sqrt(max(0.0, mean_fourth / mean_square**2 - 1))
    error = sqrt(squared_error)
    return {"mean_square": mean_square, "orthogonality_error": error, "spread": spread}


def _standard_errors(moments: Tensor) -> dict[str, float]:
    """Return the jackknife's standard error of each of the `_statistics`; `moments` as `_moments`
    returns them."""
    count = len(moments)
    without_one = [_statistics(row) for row in (moments.sum(0) - moments) / (count - 1)]
    return {
        name: sqrt((count - 1) * pvariance(each[name] for each in without_one))
        for name in without_one[0]
    }
