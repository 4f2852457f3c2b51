"""`load_model` needs only the path of a run or checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from base.checkpoint import load_checkpoint, save_checkpoint
from base.errors import CheckpointError
from experiment import Experiment, load_model
from models import build_model
from tiny_runs import config_of, write_images

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on image files that have been deleted, some images, and the model's logits of them."""
    folder = tmp_path_factory.mktemp("trained")
    for part in ("train", "test"):
        write_images(folder / "data" / part, {"cat": 9, "dog": 9, "owl": 9}, (32, 32))
    args = {"data_dir": str(folder / "data"), "batch_size": 8, "num_batches": 0}
    config = config_of(
        arch={"type": "simpleCNN2", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
        data_loader={"type": "ImageFolderDataLoader", "args": {**args, "validation_split": 0.2}},
        trainer={"epochs": 1, "ema_decay": 0.5, "monitor": "off"},
    )
    experiment = Experiment.from_config(config)
    experiment.run(str(folder / "run"))
    shutil.rmtree(folder / "data")
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        return folder / "run", images, experiment.model.eval()(images)


def test_the_logits_are_those_of_the_trainers_model_bit_for_bit(trained):
    run, images, expected = trained
    state = torch.get_rng_state()
    for path in (run, str(run / "model_last.pth"), run.parent):
        model = load_model(path)
        with torch.no_grad():
            assert torch.equal(model(images), expected)
        assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state), (
        "load_model draws nothing from the caller's generator"
    )


def test_averaged_weights(trained):
    run, _, _ = trained
    saved = load_checkpoint(run)["ema_state_dict"]
    assert all(
        torch.equal(value, saved[key])
        for key, value in load_model(run, ema=True).state_dict().items()
    )
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_model(GOLDEN / "original_checkpoint_prec_conv", ema=True)


def test_runs_of_older_versions_do_not_say_their_classes_in_the_config():
    model = load_model(GOLDEN / "old_run")
    saved = load_checkpoint(GOLDEN / "old_run")
    assert torch.equal(model.mean.flatten(), torch.tensor(saved["mean"]))
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_original_conv_norms_checkpoint_with_its_config_beside_it(tmp_path):
    source = GOLDEN / "original_checkpoint_prec_conv"
    model = load_model(source)
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    shutil.copy(source / "model_best.pth", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model_best.pth: holds no config .* models.build_model"
    ):
        load_model(tmp_path / "model_best.pth")


def test_one_channel(tmp_path):
    arch = {"type": "simpleCNN2", "args": {"num_classes": 4, "in_channels": 1}}
    model = build_model(arch, mean=[0.25], std=[0.5]).eval()
    config = {"arch": arch, "data_loader": {"type": "DigitsDataLoader"}}
    contents = {"state_dict": model.state_dict(), "mean": [0.25], "std": [0.5], "config": config}
    save_checkpoint(tmp_path / "m.pth", contents)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(load_model(tmp_path / "m.pth", device="cpu")(images), model(images))


def test_code_that_a_checkpoint_asks_for_runs_only_if_it_is_named(tmp_path):
    """Without `imports` an error names the file, and its code is not run."""
    own = tmp_path / "own_norm_of_load_model.py"
    own.write_text(
        "from torch import nn\nfrom base.registry import NORM_LAYERS\n"
        "def own(channels, affine=True):\n    return nn.GroupNorm(1, channels, affine=affine)\n"
        "NORM_LAYERS['own_norm_of_load_model'] = own\n"
    )
    code = [{"file": str(own), "sha256": "0" * 64}]
    arch = {
        "type": "simpleCNN2",
        "args": {"num_classes": 4, "norm_layer_type": "own_norm_of_load_model"},
    }
    config = {"arch": arch, "data_loader": {"type": "DigitsDataLoader"}, "imports": code}
    contents = {"state_dict": {}, "mean": [0.5] * 3, "std": [0.5] * 3, "config": config}
    save_checkpoint(tmp_path / "m.pth", contents)
    with pytest.raises(CheckpointError, match=rf"needs a user's own code, .* --imports {own}"):
        load_model(tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the model's keys"):
        load_model(tmp_path / "m.pth", imports=[own])
    images = torch.rand(2, 3, 32, 32)
    from base.registry import NORM_LAYERS

    try:
        model = build_model(arch, [0.5] * 3, [0.5] * 3).eval()
        save_checkpoint(tmp_path / "m.pth", {**contents, "state_dict": model.state_dict()})
        loaded = load_model(tmp_path / "m.pth", imports=[own])
        np.testing.assert_array_equal(loaded(images).detach(), model(images).detach())
    finally:
        del NORM_LAYERS["own_norm_of_load_model"]
