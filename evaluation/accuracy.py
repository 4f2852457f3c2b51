"""Evaluation of a model on a loader: sums over samples, reduced once."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.distributed import hide_progress_bar
from base.meters import Loss, Meters, Metric, batch_result


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: BaseDataLoader,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric],
    autocast: Callable[[], AbstractContextManager],
    description: str = "evaluating",
) -> dict[str, float]:
    """The mean loss and metrics over every sample of `loader`, as fractions; with several processes
    over every sample of every process's `loader`, which is the part of the images that it
    evaluates.

    Where the loader's labels carry noise, `clean_` values against the labels before the noise stand
    beside those against the noisy ones. The model is put in evaluation mode and restored; no
    generator is drawn from, so evaluating does not disturb training."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals, clean_totals = Meters(), Meters()
    seen = 0
    try:
        for images, labels in tqdm(
            loader, desc=description, disable=hide_progress_bar(), leave=False
        ):
            images, labels = images.to(device), labels.to(device)
            with autocast():
                logits = model(images)
            totals.add(batch_result(loss(logits, labels), logits, labels, metrics))
            if loader.clean_labels is not None:
                clean = loader.clean_labels[seen : seen + len(labels)].to(device)
                clean_totals.add(batch_result(loss(logits, clean), logits, clean, metrics))
            seen += len(labels)
    finally:
        model.train(was_training)
    clean_means = clean_totals.all_reduce().means()
    return totals.all_reduce().means() | {
        f"clean_{name}": value for name, value in clean_means.items()
    }
