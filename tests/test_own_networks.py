"""Networks that know nothing of this project, measured by one command each, from a folder outside the
clone; and against foolbox."""

from pathlib import Path

import foolbox
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data_loader.datasets import read_digits
from tiny_runs import script

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
IMAGES = 96
EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 8
UNDECIDED = 1e-3
"""Logits that are nearer to each other than this may change places by rounding."""
OWN_FILE = '''"""A shallow ResNet of torchvision's blocks."""
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def build(num_classes=10, stages=2):
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    model.layer4 = nn.Identity()
    model.layer3 = nn.Identity() if stages == 2 else model.layer3
    model.fc = nn.Linear(128, num_classes)
    return model
'''


def digits(train, channels):
    """16 x 16 images, as bytes and as the pixels in [0, 1] that they stand for; and labels."""
    data = read_digits(train)
    small = F.avg_pool2d(data.images.pixels[:, :channels].float(), 2).round().byte()
    return small, small.float() / 255, torch.from_numpy(data.labels)


def train_on_digits(network, channels, epochs, normalize):
    _, images, labels = digits(True, channels)
    images = normalize(images)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def write_test_images(folder, channels):
    """The first test images as PNG files in `test/<class>/`; their pixels in the order of the files."""
    pixels, images, labels = digits(False, channels)
    order = labels[:IMAGES].argsort(stable=True)
    for number in order.tolist():
        place = folder / "test" / str(int(labels[number]))
        place.mkdir(parents=True, exist_ok=True)
        array = pixels[number].permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(array).save(place / f"{number:04}.png")
    return images[order], labels[order]


class Behind(nn.Module):
    """The network as foolbox gets it: from pixels in [0, 1]."""

    def __init__(self, network, normalize):
        super().__init__()
        self.network, self.normalize = network, normalize

    def forward(self, images):
        return self.network(self.normalize(images))


def torchvisions(folder):
    (folder / "my_resnet.py").write_text(OWN_FILE)
    code: dict = {}
    exec(OWN_FILE, code)  # noqa: S102
    torch.manual_seed(0)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def normalize(images):
        return (images - mean) / std

    network = train_on_digits(code["build"](), 3, 1, normalize)
    # as saved by training with DataParallel
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, folder / "weights.pth")
    numbers = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    return Behind(network, normalize), 3, ["--model", "my_resnet.py:build", "-s", "weights.pth", *numbers]


def timms(folder):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    network = train_on_digits(network, 1, 2, lambda images: images)
    torch.save(network.state_dict(), folder / "weights.pth")
    words = ["--model", "timm:create_model", "-s", "weights.pth", "--model_args"]
    return network, 1, [*words, "model_name=test_resnet", "num_classes=10", "in_chans=1"]


@pytest.fixture(scope="module", params=[torchvisions, timms], ids=["torchvision", "timm"])
def measured(request, tmp_path_factory):
    """A trained network, its test images, the words of a command that measures it, and where."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    network, channels, words = request.param(folder)
    images, labels = write_test_images(folder / "digits", channels)
    with torch.no_grad():
        assert (network(images).argmax(1) == labels).float().mean() >= 0.7
    return network, images, labels, [*words, "--data", "digits", "--set", "system.num_threads=1"], folder


def attack_words():
    sizes = ["--epsilon", "8/255", "--step_size", "2/255", "--steps", str(STEPS)]
    return [*sizes, "--json", "report.json"]


def foolboxs(network, images, labels, random_start):
    """Which images foolbox's PGD breaks, and how near to each other the logits are that decide it."""
    peer = foolbox.PyTorchModel(network, bounds=(0, 1))
    torch.manual_seed(0)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=random_start)
    _, found, broken = attack(peer, images, labels, epsilons=EPSILON)
    with torch.no_grad():
        logits = network(found)
    of_label = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return broken, (of_label - others).abs()


def verdicts_of(folder):
    with np.load(folder / "report.verdicts.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_at_the_last_iterate_from_the_image_verdicts_are_foolboxs(measured):
    network, images, labels, words, folder = measured
    same = ["--set", "pgd_attack.random_start=false", "--set", "pgd_attack.early_stop=false"]
    done = script("validate_pgd.py", *words, *attack_words(), *same, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = verdicts_of(folder)
    with torch.no_grad():
        assert torch.equal(verdicts["clean_prediction"], network(images).argmax(1))
    assert torch.equal(verdicts["label"], labels)
    broken, margin = foolboxs(network, images, labels, random_start=False)
    assert 10 < int(broken.sum()) < IMAGES - 10, "an attack worth comparing"
    decided = margin > UNDECIDED
    assert int(decided.sum()) >= IMAGES - 2
    assert torch.equal(~verdicts["robust_top1"][decided], broken[decided])
