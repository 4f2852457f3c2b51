"""Digests of what an evaluation measures, by which its reports and kept verdicts are told apart."""

import hashlib

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader

DIGITS = 16
"""The number of hexadecimal digits of a digest."""


def evaluation_digests(model: nn.Module, loader: BaseDataLoader) -> dict[str, str]:
    """Return `data_digest` and `weights_digest`, as reports hold them."""
    return {"data_digest": loader.data_digest(), "weights_digest": weights_digest(model)}


def weights_digest(model: nn.Module) -> str:
    """Return the first digits of the SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        # NumPy has no bfloat16, so the bytes are hashed.
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]
