"""The config of the promise tests: nine steps on a few images, in a fraction of a second."""

import pytest

from base.config import validate
from base.config.tree import merge
from tests.soak.scenarios import SMALL, write_images


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A function that makes configs of three epochs of three minibatches with given sections.

    The network is a small one without ConvNorm, which would take half of the time.
    """
    images = tmp_path_factory.mktemp("images")
    write_images(images)
    short = {
        "arch": {"args": {"conv_layer_type": "conv", "norm_layer_type": "gn"}},
        "data_loader": {"args": {"data_dir": str(images), "num_batches": 3}},
        "trainer": {"epochs": 3, "verbosity": 0},
    }
    return lambda **sections: validate(merge(merge(SMALL, short), sections))
