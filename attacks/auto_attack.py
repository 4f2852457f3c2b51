"""AutoAttack: the standard ensemble by which robustness is reported, through the package
pyautoattack."""

import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.classifier import Model
from attacks.losses import wrongness
from attacks.threat_model import Generators, draw
from base.errors import ConfigError

NORMS_OF_PACKAGE = {"linf": "Linf", "l2": "L2"}
STANDARD_TARGETS = 9


@dataclass(frozen=True)
class AutoAttack(Attack):
    """Standard AutoAttack (Croce and Hein, arXiv:2003.01690): APGD on cross entropy, then targeted
    APGD, targeted FAB and Square, each on the images that the previous attacks did not break.

    An adapter of the optional package pyautoattack, with the values of its version "standard": 100
    steps, 9 targets, 5000 queries. Each call is one evaluation of the whole batch. Images that no
    attack breaks, and those that are misclassified from the beginning, come back unchanged. The
    seed of an evaluation is drawn from the first generator; the package draws for the batch as a
    whole, so an image's result depends on the images beside it.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        norm: `"linf"` or `"l2"`.
        seed: of all random draws, if a call passes no generators.

    Attributes:
        warnings: reasons to doubt the evaluation (a randomized model, zero gradients, fewer targets
            than the standard), over all calls, in order. Of warnings that differ only in their
            numbers, the first is kept.

    Raises:
        ConfigError: the package is not installed.
        ValueError: an argument is out of its range. A call raises it for images that are not
            float32 and for a model with fewer than 4 classes.
    """

    epsilon: float
    norm: str = "linf"
    _: KW_ONLY
    seed: int = 0
    # Large logits flatten the gradient of cross entropy, not that of this loss
    loss: str = field(default="dlr", init=False, repr=False, compare=False)
    warnings: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _import("autoattack")

    @property
    def min_classes(self) -> int:
        return 4

    @property
    def version(self) -> str:
        """The installed version of pyautoattack."""
        return importlib.metadata.version("pyautoattack")

    @property
    def description(self) -> str:
        """The ensemble and its version, for reports."""
        return f"standard AutoAttack (pyautoattack {self.version}: apgd-ce, apgd-t, fab-t, square)"

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        if images.dtype != torch.float32:
            raise ValueError(f"images: AutoAttack computes in float32, not {images.dtype}")
        with torch.no_grad():
            logits = model(images)
        n_classes = logits.shape[1]
        if n_classes < self.min_classes:
            raise ValueError(
                f"AutoAttack needs at least {self.min_classes} classes for its targeted DLR loss,"
                f" the model has {n_classes}"
            )
        if n_classes <= STANDARD_TARGETS:
            self._warn(
                f"the model has {n_classes} classes: {n_classes - 1} targets instead of the"
                f" standard {STANDARD_TARGETS} in apgd-t and fab-t"
            )
        # Decided here, as the package would take NaN for a class
        remaining = (wrongness(logits, labels) == 0).nonzero().flatten()
        if len(remaining) == 0:
            return images
        seed = _seed(images, generators)
        # The package seeds the global generators of all CUDA devices, wherever the images are;
        # asking for their states would start CUDA in a process that does not use it
        devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with (
            torch.random.fork_rng(devices=devices),
            _float32_by_default(),
            _keep_tracer(),
            _collect(self._warn),
        ):
            attack = self._build(model, n_classes, seed, images.device)
            found, _ = attack.run_standard_evaluation(
                images[remaining], labels[remaining], batch_size=len(images)
            )
        return images.index_copy(0, remaining, found)

    def _build(self, model: Model, n_classes: int, seed: int, device: torch.device) -> Any:
        """Return the package's attack, with as many targets as the model has."""

        def logits(points: Tensor) -> Tensor:
            # Square passes an empty batch when all remaining images are tied with another class,
            # which not every model can take
            if len(points) == 0:
                return points.new_zeros(0, n_classes)
            return model(points)

        attack = _import("autoattack").AutoAttack(
            logits,
            norm=NORMS_OF_PACKAGE[self.threat_model.norm],
            eps=self.threat_model.epsilon,
            seed=seed,
            version="standard",
            device=device,
        )
        targets = min(STANDARD_TARGETS, n_classes - 1)
        attack.apgd_targeted.n_target_classes = targets
        attack.fab.n_target_classes = targets
        return attack

    def _warn(self, message: str) -> None:
        def without_numbers(warning: str) -> str:
            return re.sub(r"\d+(\.\d+)?", "0", warning)

        if without_numbers(message) not in map(without_numbers, self.warnings):
            self.warnings.append(message)


def _import(module: str) -> Any:
    """Import a module of the package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ModuleNotFoundError as error:
        # A package that pyautoattack itself misses is another error
        if error.name is None or not error.name.startswith("pyautoattack"):
            raise
        raise ConfigError(
            'AutoAttack needs the package pyautoattack: pip install -e ".[autoattack]"'
        ) from None


def _seed(images: Tensor, generators: Generators) -> int:
    """Draw the seed of the package's own generators."""
    if callable(generators):
        return int(2**31 * draw(torch.rand, images[:, 0, 0, 0], generators)[0])
    if not isinstance(generators, torch.Generator):
        generators = generators[0]
    return int(torch.randint(2**31, (), generator=generators))


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Within the context the default dtype is float32, in which the package makes its numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _keep_tracer() -> Iterator[None]:
    """Within the context the package may trace the model's forward pass, which it does to count
    calls; afterwards the tracer of a debugger or a coverage tool is back."""
    # The package's counters are global: without a reset, one suspicious model taints all later ones
    counters = _import("checks").funcs
    counters.update(dict.fromkeys(counters, 0))
    tracer = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(tracer)


@contextmanager
def _collect(warn: Callable[[str], None]) -> Iterator[None]:
    """Within the context the package's logger is silent, and its warnings go to `warn`."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(record.getMessage())

    logger = logging.getLogger("auto-attack")
    handlers = logger.handlers
    level = logger.level
    propagate = logger.propagate
    disabled = logger.disabled
    try:
        logger.handlers = [Collector()]
        logger.propagate = False
        logger.disabled = False
        logger.setLevel(logging.WARNING)
        yield
    finally:
        logger.handlers = handlers
        logger.propagate = propagate
        logger.disabled = disabled
        logger.setLevel(level)
