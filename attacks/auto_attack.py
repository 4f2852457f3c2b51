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
from attacks.threat_model import Generators
from base.errors import ConfigError

NORMS_OF_PACKAGE = {"linf": "Linf", "l2": "L2"}
STANDARD_TARGETS = 9


@dataclass(frozen=True)
class AutoAttack(Attack):
    """Standard AutoAttack (Croce and Hein, arXiv:2003.01690): APGD on cross entropy, then targeted
    APGD, targeted FAB and Square, each on the images that those before did not break.

    An adapter of the optional package pyautoattack, with the numbers of its version "standard": 100
    steps, 9 targets, 5000 queries. Each call is one evaluation of the whole batch. Images that no
    attack breaks, and those that are misclassified from the beginning, come back unchanged. The
    seed of an evaluation is drawn from the first generator; the package draws for the batch as a
    whole, so an image's result depends on the images beside it.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        norm: `"linf"` or `"l2"`.
        seed: of all draws, where a call brings no generators.

    Attributes:
        warnings: what the package, or this class, holds against the evaluation (a randomized model,
            zero gradients, fewer targets than the standard), over all calls, in order. Of warnings
            that differ in their numbers only, the first.

    Raises:
        ConfigError: the package is not installed.
        ValueError: an argument out of its range. A call: images that are not float32, or a model
            with fewer than 4 classes.
    """

    epsilon: float
    norm: str = "linf"
    _: KW_ONLY
    seed: int = 0
    # unlike cross entropy's, the gradient of this loss is not flattened by large logits
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
        """What stands behind a robust accuracy, for reports."""
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
                f"AutoAttack needs at least 4 classes (its targeted DLR loss does), the model has {n_classes}"
            )
        if n_classes <= STANDARD_TARGETS:
            self._warn(
                f"the model has {n_classes} classes: {n_classes - 1} targets instead of the standard {STANDARD_TARGETS} "
                "in apgd-t and fab-t"
            )
        # the package would take NaN for a class
        standing = (wrongness(logits, labels) == 0).nonzero().flatten()
        if len(standing) == 0:
            return images
        first = generators if isinstance(generators, torch.Generator) else generators[0]
        seed = int(torch.randint(2**31, (), generator=first))
        # all CUDA devices: seeding one that is not in use yet would be remembered until it is
        devices = range(torch.cuda.device_count() if images.is_cuda else 0)
        with torch.random.fork_rng(devices=devices), _kept_tracer(), _heard(self._warn):
            attack = self._build(model, n_classes, seed, images.device)
            some = images[standing], labels[standing]
            found, _ = attack.run_standard_evaluation(*some, batch_size=len(images))
        return images.index_copy(0, standing, found)

    def _build(self, model: Model, n_classes: int, seed: int, device: torch.device) -> Any:
        """The package's attack, with targets that exist."""

        def logits(points: Tensor) -> Tensor:
            # Square asks for no images when all that are left are tied with another class, and not
            # every model can do that
            return model(points) if len(points) else points.new_zeros(0, n_classes)

        attack = _import("autoattack").AutoAttack(
            logits,
            norm=NORMS_OF_PACKAGE[self.threat_model.norm],
            eps=self.threat_model.epsilon,
            seed=seed,
            version="standard",
            device=device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(
            STANDARD_TARGETS, n_classes - 1
        )
        return attack

    def _warn(self, message: str) -> None:
        def kind(warning: str) -> str:
            return re.sub(r"\d+(\.\d+)?", "0", warning)

        if kind(message) not in map(kind, self.warnings):
            self.warnings.append(message)


def _import(module: str) -> Any:
    """A module of the package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("pyautoattack"):
            raise
        raise ConfigError(
            'AutoAttack needs the package pyautoattack: pip install -e ".[autoattack]"'
        ) from None


@contextmanager
def _kept_tracer() -> Iterator[None]:
    """The package counts calls in the model's forward pass by tracing it, and ends with no tracer:
    a debugger's or a coverage tool's would be gone. Its counters are global, so one suspicious
    model would taint all later ones: they begin at 0."""
    counters = _import("checks").funcs
    counters.update(dict.fromkeys(counters, 0))
    tracer = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(tracer)


@contextmanager
def _heard(warn: Callable[[str], None]) -> Iterator[None]:
    """Within the context the package's logger is silent, and its warnings go to `warn`."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(record.getMessage())

    logger = logging.getLogger("auto-attack")
    handlers, level, propagate, disabled = (
        logger.handlers,
        logger.level,
        logger.propagate,
        logger.disabled,
    )
    try:
        logger.handlers, logger.propagate, logger.disabled = [Listener()], False, False
        logger.setLevel(logging.WARNING)
        yield
    finally:
        logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
        logger.setLevel(level)
