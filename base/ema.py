"""An exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.checkpoint import load_weights


class ModelEma:
    """A second model whose weights follow those of a first: `average <- d average + (1 - d)
    weights` after every update.

    `d = min(decay, (1 + t) / (10 + t))` after t updates, so that the random first weights are soon
    forgotten. What is no parameter is treated by its nature: running statistics of batch
    normalization are averaged like the weights; buffers that are functions of the weights
    (ConvNorm's spectrum, the singular vectors of spectral normalization) are recomputed from the
    averaged weights, by the layer's `buffers_from_weights()`; all others are copied.

    Args:
        model: the model to follow.
        decay: d, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.source = model
        self.decay = decay
        self.updates = 0
        self._model = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the source by one update."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(_averaged(self._model)), list(_averaged(self.source)), 1 - decay)

    @property
    def model(self) -> nn.Module:
        """The averaged model in evaluation mode, with its buffers up to date."""
        averaged = {id(tensor) for tensor in _averaged(self._model)}
        with torch.no_grad():
            for ours, theirs in zip(self._model.buffers(), self.source.buffers(), strict=True):
                if id(ours) not in averaged:
                    # of any size: ConvNorm's spectrum gets its own in the first step
                    ours.data = theirs.data.clone()
            for module in self._model.modules():
                if hasattr(module, "buffers_from_weights"):
                    module.buffers_from_weights()
        return self._model.eval()

    def load_state_dict(
        self, state: Mapping[str, Tensor], updates: int, source: str | Path = "averaged weights"
    ) -> None:
        """Continue from a saved average; `source` names it in messages.

        Raises:
            CheckpointError: it is of another architecture.
        """
        load_weights(self._model, state, source)
        self.updates = updates


def _averaged(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that are averaged, in a fixed order: parameters, and running statistics of batch
    normalization."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield from (module.running_mean, module.running_var)
