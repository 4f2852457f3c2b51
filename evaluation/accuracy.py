"""Loss and metrics of a model on a loader: summed over samples, reduced over processes once."""

from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.distributed import hide_progress_bar
from base.meters import Loss, Meters, Metric, batch_result
from evaluation.attack_batch import Autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: BaseDataLoader,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric],
    autocast: Autocast,
    description: str = "evaluating",
) -> dict[str, float]:
    """Return the mean loss and metrics over every sample of `loader`, metrics as fractions.

    With several processes `loader` is this process's shard, and the means are over all shards. If
    the loader's labels carry noise, the result also holds `clean_` values, which
    are against the labels before the noise. The model is put into evaluation mode, and back into
    training mode if it was in that. No random numbers are drawn, so evaluating does not disturb
    training.

    Args:
        model: maps images `(B, C, H, W)` to logits `(B, classes)`.
        loader: the images, neither shuffled nor augmented.
        loss: `(logits, labels)` -> losses per sample `(B,)`.
        metrics: name -> metric of logits and labels.
        autocast: the context of the forward passes.
        description: the text before the progress bar.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    meters = Meters()
    clean_meters = Meters()
    seen = 0
    try:
        for images, labels in tqdm(
            loader, desc=description, disable=hide_progress_bar(), leave=False
        ):
            images = images.to(device)
            labels = labels.to(device)
            with autocast():
                logits = model(images)
            meters.add(batch_result(loss(logits, labels), logits, labels, metrics))
            if loader.clean_labels is not None:
                # Loaders to evaluate keep the order of `clean_labels`
                clean = loader.clean_labels[seen : seen + len(labels)].to(device)
                clean_meters.add(batch_result(loss(logits, clean), logits, clean, metrics))
            seen += len(labels)
    finally:
        model.train(was_training)
    # Both reductions are collective calls: every process makes them in this order.
    clean_means = clean_meters.all_reduce().means()
    means = meters.all_reduce().means()
    for name, value in clean_means.items():
        means[f"clean_{name}"] = value
    return means
