"""An exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.checkpoint import load_weights


class ModelEma:
    """A second model with the moving average of a first model's weights: after every update
    `average <- d average + (1 - d) weights`, with `d = min(decay, (1 + t) / (10 + t))` after t
    updates.

    Running statistics of batch normalization are averaged like the weights. Buffers that are
    functions of the weights (ConvNorm's spectrum, the singular vectors of spectral normalization)
    are recomputed from the averaged weights, by the layer's `buffers_from_weights()`. All other
    buffers are copied.

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
        """Follow one update of the source."""
        self.updates += 1
        # Small at first, so that the random initial weights are soon forgotten
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(_averaged_tensors(self._model))
        torch._foreach_lerp_(averages, list(_averaged_tensors(self.source)), 1 - decay)

    @property
    def model(self) -> nn.Module:
        """The averaged model in evaluation mode, with its buffers up to date."""
        averaged = {id(tensor) for tensor in _averaged_tensors(self._model)}
        buffers = zip(self._model.buffers(), self.source.buffers(), strict=True)
        with torch.no_grad():
            for buffer, of_source in buffers:
                if id(buffer) not in averaged:
                    # Data, not copy_: the source's first step may change a buffer's size, as that
                    # of ConvNorm's spectrum
                    buffer.data = of_source.data.clone()
            for module in self._model.modules():
                if hasattr(module, "buffers_from_weights"):
                    module.buffers_from_weights()
        return self._model.eval()

    def load_state_dict(
        self, state: Mapping[str, Tensor], updates: int, source: str | Path = "averaged weights"
    ) -> None:
        """Continue from a saved average.

        Args:
            state: the averaged model's state dict.
            updates: updates that it has followed.
            source: its name in messages.

        Raises:
            CheckpointError: the state is that of another architecture.
        """
        load_weights(self._model, state, source)
        self.updates = updates


def _averaged_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that are averaged, in a fixed order: parameters, and running statistics of batch
    normalization."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield from (module.running_mean, module.running_var)
