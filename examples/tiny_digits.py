"""A data set: scikit-learn's digits, 8 x 8 pixels with one channel."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from sklearn.datasets import load_digits
from torch import Tensor

from base.base_data_loader import BaseDataLoader
from base.registry import DATA_LOADERS


class TinyDigits(BaseDataLoader):
    """Digits, of which every n-th is a test image and the others are for training.

    Args:
        test_every: n.
        part: which of the two sets.
    """

    class_names = tuple("0123456789")

    def __init__(
        self,
        test_every: Annotated[int, Field(ge=2)] = 5,
        part: Literal["train", "test"] = "train",
    ) -> None:
        digits = load_digits()
        is_test = torch.arange(len(digits.target)) % test_every == 0
        chosen = is_test if part == "test" else ~is_test
        # 16 is the largest gray value
        self.pixels = torch.from_numpy(digits.images).float().unsqueeze(1)[chosen] / 16
        self.labels = torch.from_numpy(digits.target).long()[chosen]
        self.test_every = test_every

    def images_at(self, positions: Tensor) -> Tensor:
        """Return float32 `(B, 1, 8, 8)` in `[0, 1]`."""
        return self.pixels[positions]

    def test_loader(self) -> "TinyDigits":
        """Return the test set."""
        return TinyDigits(self.test_every, "test")


DATA_LOADERS["TinyDigits"] = TinyDigits
