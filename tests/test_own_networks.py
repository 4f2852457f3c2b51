"""Networks of other code are measured by one command each, and compared with foolbox."""

import csv
import json
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
EPSILON, STEP, STEPS = 4 / 255, 1 / 255, 8
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


TINY = """from torch import nn


def build(width=3, classes=10):
    head = nn.Linear(16 * width, classes)
    first = nn.Conv2d(1, width, 3, stride=2)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), head)


def needs(depth):
    return build(depth)


def fails():
    raise RuntimeError("out of luck")


def no_network():
    return {}


def exits():
    raise SystemExit(0)


class Late(nn.Module):
    '''Fails in a late forward pass.'''

    def __init__(self, error, after=3):
        super().__init__()
        self.network = build()
        self.error = error
        self.after = after
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        if self.passes > self.after:
            raise eval(self.error)
        return self.network(images)


def late(error):
    return Late(error)


class NoModes(nn.Module):
    def eval(self):
        raise RuntimeError("no modes")


class NoAnswer(nn.Module):
    '''Returns nothing from methods that should return the module.'''

    def __init__(self):
        super().__init__()
        self.network = build()

    def forward(self, images):
        return self.network(images)

    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        super().eval()


def sometimes():
    return Late("RuntimeError('late')", after=1)


def on_meta():
    return build().to("meta")
"""


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
    """The first test images as PNG files in `test/<class>/`; their pixels in the order of the
    files."""
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
    # As saved by training with DataParallel
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, folder / "weights.pth")
    numbers = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    return (
        Behind(network, normalize).eval(),
        3,
        ["--model", "my_resnet.py:build", "-s", "weights.pth", *numbers],
    )


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
    return (
        network,
        images,
        labels,
        [*words, "--data", "digits", "--set", "system.num_threads=1"],
        folder,
    )


def attack_words():
    sizes = ["--epsilon", "4/255", "--step_size", "1/255", "--steps", str(STEPS)]
    return [*sizes, "--json", "report.json"]


def foolboxs(network, images, labels, random_start):
    """Which images foolbox's PGD breaks, and how near to each other the logits are that decide
    it."""
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


def test_verdicts_at_the_last_iterate_from_the_image_equal_foolboxs(measured):
    network, images, labels, words, folder = measured
    same = ["--set", "pgd_attack.random_start=false", "--set", "pgd_attack.early_stop=0"]
    done = script("validate_pgd.py", *words, *attack_words(), *same, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = verdicts_of(folder)
    with torch.no_grad():
        assert torch.equal(verdicts["clean_prediction"], network(images).argmax(1))
    assert torch.equal(verdicts["label"], labels)
    broken, margin = foolboxs(network, images, labels, random_start=False)
    assert 5 < int(broken.sum()) < IMAGES - 5, "an attack worth comparing"
    decided = margin > UNDECIDED
    assert int(decided.sum()) >= IMAGES - 2
    assert torch.equal(~verdicts["robust_top1"][decided], broken[decided])


def test_with_starts_at_least_as_many_images_are_broken_as_by_foolbox(measured):
    network, images, labels, words, folder = measured
    done = script("validate_pgd.py", *words, *attack_words(), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    broken, _ = foolboxs(network, images, labels, random_start=True)
    ours = int((~verdicts_of(folder)["robust_top1"]).sum())
    assert ours >= int(broken.sum()) - 1
    report = json.loads((folder / "report.json").read_text())
    assert report["n"] == IMAGES
    assert report["robust_top1"] == pytest.approx(1 - ours / IMAGES)
    assert report["model"] == words[1]
    assert report["checkpoint"] == "weights.pth"
    assert report["data"] == "digits"
    if "--mean" in words:
        wrapper = {
            "mean": list(MEAN),
            "std": list(STD),
            "by": "a module Normalized around the network",
        }
        assert report["normalization"] == wrapper
        assert report["assumed"] == {"keys": "the prefix 'module.' is dropped"}
    else:
        assert report["normalization"] is None
        assert "pixels in [0, 1] as they are" in report["assumed"]["normalization"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny network of one file, its images in `<class>/`, and the words of its commands."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny_network.py").write_text(TINY)
    code: dict = {}
    exec(TINY, code)  # noqa: S102
    torch.manual_seed(0)
    network = code["build"](width=4).eval()
    torch.save(network.state_dict(), folder / "weights.pth")
    images, labels = write_test_images(folder / "digits", 1)
    (folder / "digits" / "test").rename(folder / "images")
    words = ["--model", "tiny_network.py:build", "--model_args", "width=4", "-s", "weights.pth"]
    return (
        network,
        images,
        labels,
        [*words, "--data", "images", "--set", "system.num_threads=1"],
        folder,
    )


def test_a_users_network_gets_doctor_and_pictures(tiny):
    _, _, _, words, folder = tiny
    words = [*words, "--limit", 8, "--steps", 2, "--json", "a.json", "--figure", "a.png"]
    done = script("validate_pgd.py", *words, "--doctor", 4, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((folder / "a.json").read_text())
    assert report["n"] == 8
    assert report["checks"]
    assert report["model_args"] == {"width": 4}
    assert (folder / "a.png").exists()
    assert (folder / "a_epsilon.png").exists()
    done = script("fgsm.py", *words[:-6], "--json", "a.json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "a.json").read_text())["n"] == 8


def test_class_report_writes_predictions_with_file_names(tiny):
    network, images, labels, words, folder = tiny
    done = script("class_report.py", *words, "--json", "a.json", "--csv", "images.csv", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    with torch.no_grad():
        probabilities = network(images).softmax(dim=1)
    predicted = probabilities.argmax(1)
    assert json.loads((folder / "a.json").read_text())["top1"] == pytest.approx(
        float((predicted == labels).float().mean())
    )
    with (folder / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["position"] for row in rows] == list(map(str, range(IMAGES)))
    assert [row["prediction"] for row in rows] == [str(int(name)) for name in predicted]
    found = [float(row["confidence"]) for row in rows]
    assert found == pytest.approx(probabilities.amax(1).tolist(), abs=1e-5)
    data = folder / words[words.index("--data") + 1]
    assert all((data / row["file"]).is_file() for row in rows)
    assert [Path(row["file"]).parent.name for row in rows] == [row["label"] for row in rows]


def test_spectra_of_a_users_own_network(tiny):
    network, _, _, words, folder = tiny
    done = script("spectrum.py", *words, "--json", "a.json", "--figure", "a.svg", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    layers = {
        layer["name"]: layer for layer in json.loads((folder / "a.json").read_text())["layers"]
    }
    assert list(layers) == ["0", "4"]
    exact = np.linalg.norm(network[4].weight.detach().numpy().astype(float), 2)
    assert layers["4"]["norm"] == pytest.approx(exact, rel=1e-5)


BAD_INPUT = {
    "a misspelt function": (
        ["--model", "tiny_network.py:bild"],
        2,
        "has no bild; did you mean 'build'?",
    ),
    "no function": (
        ["--model", "tiny_network.py"],
        2,
        "expected FILE.py:FUNCTION or MODULE:FUNCTION",
    ),
    "no file": (["--model", "tiny.py:build"], 2, "tiny.py: no such file"),
    "no module": (
        ["--model", "torchvsion.models:resnet18"],
        2,
        "torchvsion.models: no such module",
    ),
    "code that fails": (
        ["--model", "broken_code.py:build"],
        2,
        "broken_code.py: line 1: SyntaxError",
    ),
    "arguments missing": (
        ["--model", "tiny_network.py:needs"],
        2,
        "--model_args: missing a required argument: 'depth'; needs of --model",
    ),
    "unknown argument": (
        ["--model_args", "wdth=3"],
        2,
        "--model_args: got an unexpected keyword argument 'wdth'; build of --model",
    ),
    "a failing function": (
        ["--model", "tiny_network.py:fails"],
        2,
        "fails() failed: RuntimeError: out of luck",
    ),
    "a function that ends the process": (
        ["--model", "tiny_network.py:exits"],
        2,
        "error: --model tiny_network.py:exits: exits() failed: SystemExit: 0\n",
    ),
    "a network that fails late": (
        ["--model", "tiny_network.py:late", "--model_args", "error=RuntimeError('late')"],
        2,
        "error: --model tiny_network.py:late: RuntimeError: late (--debug shows where)\n",
    ),
    "a network that fails late as if it broke its contract": (
        ["--model", "tiny_network.py:late", "--model_args", "error=TypeError('late')"],
        2,
        "error: --model tiny_network.py:late: TypeError: late (--debug shows where)\n",
    ),
    "a network that ends the process": (
        ["--model", "tiny_network.py:late", "--model_args", "error=SystemExit(0)"],
        2,
        "error: --model tiny_network.py:late: SystemExit: 0 (--debug shows where)\n",
    ),
    "weights on the meta device": (
        ["--model", "tiny_network.py:on_meta"],
        2,
        "error: --model tiny_network.py:on_meta: NotImplementedError: ",
    ),
    "a network that cannot change its mode": (
        ["--model", "tiny_network.py:NoModes"],
        2,
        "error: --model tiny_network.py:NoModes: RuntimeError: no modes (--debug shows where)\n",
    ),
    "no network": (
        ["--model", "tiny_network.py:no_network"],
        2,
        "returned a dict; expected a torch.nn.Module",
    ),
    "one output": (
        ["--model_args", "classes=1"],
        2,
        "logits (B, classes) of at least 2 classes, not of 1",
    ),
    "other classes": (
        ["--model_args", "classes=7"],
        4,
        "has 10 classes, but the network of --model gives 7 logits",
    ),
    "images that do not fit": (
        ["--mean", "0.5,0.5,0.5", "--std", "1,1,1"],
        4,
        "3 channels, which Normalized cannot take",
    ),
    "other weights": (
        ["--model_args", "width=5", "-s", "weights.pth"],
        3,
        "--model and --model_args",
    ),
    "keys that are missing": (
        ["-s", "half.pth", "--model_args", "width=4"],
        3,
        "lacks 2 of the model's keys",
    ),
    "no data": (["--data", "nowhere"], 4, "--data: 'nowhere' is not a folder"),
    "config and model": (["-c", "config.json"], 2, "-c and --model"),
    "averaged weights": (["--ema"], 2, "--ema and --model"),
    "mean alone": (["--mean", "0.5"], 2, "--mean: needs --std, too"),
    "as many": (["--mean", "0.5", "--std", "1,1,1"], 2, "1 and 3 numbers"),
    "std of 0": (["--mean", "0.5", "--std", "0"], 2, "above 0"),
    "another network's setting": (
        ["--set", "arch.type=vgg16"],
        2,
        "--set arch.type=vgg16: has no effect",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(tiny, name):
    more, code, message = BAD_INPUT[name]
    folder = tiny[-1]
    (folder / "broken_code.py").write_text("def build(:\n")
    state = torch.load(folder / "weights.pth")
    torch.save(
        {key: value for key, value in state.items() if key.startswith("0.")}, folder / "half.pth"
    )
    words = {"--model": "tiny_network.py:build", "--data": "images"}
    words |= dict(zip(more[::2], [*more[1::2], None], strict=False))
    words = [word for pair in words.items() for word in pair if word is not None]
    done = script("fgsm.py", *words, cwd=folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("command", ["class_report.py", "spectrum.py", "validate_pgd.py"])
def test_every_command_says_in_one_line_that_a_users_network_failed(tiny, command):
    folder = tiny[-1]
    words = ["--model", "tiny_network.py:sometimes", "--data", "images"]
    done = script(command, *words, cwd=folder)
    line = "error: --model tiny_network.py:sometimes: RuntimeError: late (--debug shows where)\n"
    assert (done.returncode, done.stderr) == (2, line)
    done = script(command, *words, "--debug", cwd=folder)
    assert done.returncode == 1
    assert 'tiny_network.py", line' in done.stderr


def test_a_users_network_may_return_nothing_from_train_and_eval(tiny):
    words = ["--model", "tiny_network.py:NoAnswer", "--data", "images", "--limit", 4]
    done = script("fgsm.py", *words, cwd=tiny[-1])
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_for_a_users_own_network_need_one(tmp_path):
    done = script("fgsm.py", "-s", "m.pth", "--data", "images", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --data: belongs to a network of --model, which is not given\n",
    )
    done = script("fgsm.py", "--model", "my.py:build", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --data: required with --model: the folder of the test images\n",
    )
