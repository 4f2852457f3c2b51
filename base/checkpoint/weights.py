"""Load weights into a model, whatever prefix or extra entries the file has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.checkpoint.foreign_weights import below, explain_rest, find_prefix, first_keys, rename
from base.errors import CheckpointError
from base.text import one_line


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str | Path,
    how_to_choose: str = "arch.type and arch.args, by -c CONFIG or --set",
) -> dict[str, str]:
    """Copy weights into `model`, whatever prefix a wrapper has put before their keys.

    A mean and std among them (`mu` and `sigma`) become the model's own. Every other entry beside
    the weights must be known to have no effect; see `base.checkpoint.foreign_weights`.

    Args:
        model: gets the weights.
        state_dict: the weights.
        source: the file, for errors.
        how_to_choose: how the user chooses another network, for errors.

    Returns:
        Subject -> a sentence on what was assumed; empty if the keys are exactly the model's.

    Raises:
        CheckpointError: the weights belong to another architecture; the message names the first
            keys of both sides.
    """
    source = str(source)
    if not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError(
            f"{source}: is not a checkpoint: its weights have keys that are not names:"
            f" {first_keys(state_dict)}"
        )
    model_keys = list(model.state_dict())
    file_keys = list(state_dict)
    # 1. the file's names for modules become the model's
    state_dict, assumed = rename(model, state_dict)
    # 2. a wrapper's prefix, such as `module.`, is dropped
    prefix, copies = find_prefix(model_keys, state_dict, source)
    if prefix:
        assumed = assumed | {"keys": f"the prefix {one_line(prefix, 60)!r} is dropped"}
    weights = below(state_dict, prefix)
    # 3. the weights are copied
    _check_types(model, weights, source)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        # The last line is about a tensor's shape; those before it name the class
        difference = str(error).splitlines()[-1].strip().rstrip(".")
        raise CheckpointError(
            f"{source}: does not fit {type(model).__name__}: {difference}; give the network that"
            f" it was trained as ({how_to_choose}), with its num_classes, width and depth"
        ) from None
    # 4. every other entry of the file needs an explanation
    rest = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    rest |= {prefix + key: weights[key] for key in unexpected}
    unexplained, explanations = explain_rest(model, weights, rest, prefix, copies, source)
    if missing or unexplained:
        raise CheckpointError(
            f"{source}: is of another architecture than this {type(model).__name__}:"
            f" {_difference(missing, unexplained)}; its keys: {first_keys(file_keys)};"
            f" the model's: {first_keys(model_keys)}; {_advice(missing, how_to_choose)}"
        )
    return assumed | explanations


def _check_types(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Check that floating-point weights are dense tensors of floating-point numbers."""
    # torch would silently convert the integers of a quantized model and drop imaginary parts
    for key, own in model.state_dict().items():
        value = weights.get(key)
        if not isinstance(value, Tensor) or not own.is_floating_point():
            continue
        is_dense = value.layout == torch.strided and not value.is_meta
        if is_dense and value.is_floating_point():
            continue
        kind = f"{value.dtype}, {value.layout}"
        if value.is_meta:
            kind = "a meta tensor"
        raise CheckpointError(
            f"{source}: {key!r} is {kind.replace('torch.', '')};"
            " expected a dense tensor of floating-point numbers"
        )


def _difference(missing: Sequence[str], unexplained: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of the model's keys ({missing[0]}, ...)")
    if unexplained:
        first = one_line(unexplained[0], 80)
        parts.append(f"it has {len(unexplained)} keys that the model lacks ({first}, ...)")
    return " and ".join(parts)


def _advice(missing: Sequence[str], how_to_choose: str) -> str:
    if missing:
        return f"give the network that it was trained as ({how_to_choose}), or rename its keys"
    return (
        "save it without them if its network does not use them; if it does, it is another network"
    )
