"""The ConvNorm package as others use it: installed by itself, beside the clone's copy, exported."""

import importlib.util
import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from base.ema import ModelEma
from benchmarks.original_conv_norm import OriginalConvNorm, use_original_conv_norm
from evaluation.layer_trace import linear_calls
from evaluation.spectral_norm import measure
from models.layers import ConvNorm2d, replace_with_conv_norm

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "layers" / "conv_norm"


def run(words, folder):
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_installation_brings_one_name_and_shadows_nothing(tmp_path, editable):
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    clone, site, own = (tmp_path / name for name in ("clone", "site", "own"))
    # A copy, because a build writes beside its sources, with rooms that must not be installed.
    package = clone / "models" / "layers" / "conv_norm"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
    files = ("pyproject.toml", "README.md", "MANIFEST.in", "train.py")
    for name in (*files, "base/__init__.py", "models/__init__.py"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    words = ["install", *offline, "--target", site, *(["-e"] if editable else []), clone]
    done = run([sys.executable, "-m", "pip", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [file.read_text() for file in site.glob("*/top_level.txt")] == ["conv_norm\n"]
    if not editable:
        assert {file.name for file in site.iterdir() if file.suffix != ".dist-info"} == {
            "conv_norm"
        }
        assert (site / "conv_norm" / "py.typed").exists()
    (own / "models").mkdir(parents=True)
    for name in ("models/__init__.py", "base.py", "attacks.py"):
        (own / name).write_text("mine = True\n")
    # -S leaves out the environment's own site packages, where this project may be installed, too.
    # They are appended for torch, which is found there.
    others = [folder for folder in sys.path if folder.endswith("site-packages")]
    code = (
        f"import importlib.util, json, site, sys; site.addsitedir({str(site)!r})\n"
        f"sys.path += {others}\n"
        "where = importlib.util.find_spec('conv_norm').origin\n"
        "import models, base, attacks\n"
        "rooms = ['data_loader', 'trainer', 'evaluation', 'experiment', 'studies', 'train']\n"
        "found = [room for room in rooms if importlib.util.find_spec(room)]\n"
        "own = models.mine and base.mine and attacks.mine\n"
        "print(json.dumps([where, own, found]))\n"
    )
    if not editable:
        code += (
            "from torch import nn, zeros\n"
            "from conv_norm import ConvNorm2d, replace_with_conv_norm\n"
            "norm = nn.BatchNorm2d(4)\n"
            "network = replace_with_conv_norm(nn.Sequential(nn.Conv2d(3, 4, 3), norm))\n"
            "assert type(network[0]) is ConvNorm2d\n"
            "assert network(zeros(2, 3, 8, 8)).shape == (2, 4, 6, 6)\n"
        )
    done = run([sys.executable, "-S", "-c", code], own)
    assert done.returncode == 0, done.stderr
    where = package if editable else site / "conv_norm"
    assert json.loads(done.stdout) == [str(where / "__init__.py"), True, []]


@pytest.fixture
def installed(monkeypatch):
    """The package under the name of an installation: its classes are not the clone's."""
    spec = importlib.util.spec_from_file_location("conv_norm", FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "conv_norm", package)
    spec.loader.exec_module(package)
    yield package
    for name in [name for name in sys.modules if name.startswith("conv_norm.")]:
        del sys.modules[name]


def small_network(layer):
    torch.manual_seed(0)
    network = nn.Sequential(
        layer(3, 4, 3, padding=1),
        nn.ReLU(),
        layer(4, 6, 3, stride=2, padding=1, bias=True, affine=False),
        nn.ReLU(),
        layer(6, 4, 1, bn=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8))
    with torch.no_grad():
        network[0].weight.mul_(2).add_(0.1)
    return network


def test_layers_of_an_installed_package_are_recognized(installed):
    assert installed.ConvNorm2d is not ConvNorm2d
    results = []
    for layer in (ConvNorm2d, installed.ConvNorm2d):
        network = small_network(layer)
        calls = linear_calls(network, (3, 8, 8))
        found = [
            (call.name, call.input_shape, call.batch_norm_scale, measure(call)) for call in calls
        ]
        averaged = ModelEma(network, 0.9).model.modules()
        spectra = [module.running_V.numel() for module in averaged if hasattr(module, "running_V")]
        swapped = use_original_conv_norm(deepcopy(network)).modules()
        swaps = sum(isinstance(module, OriginalConvNorm) for module in swapped)
        results.append((found, spectra, swaps))
        assert replace_with_conv_norm(network)[0].__class__ is layer
    ours, theirs = results
    assert theirs == ours
    # The second convolution has a batch norm behind it, the others have a depthwise convolution.
    assert [name for name, *_ in ours[0]] == ["0", "0.bpconv", "2", "4", "4.bpconv", "7"]
    assert [name for name, _, scale, _ in ours[0] if scale is not None] == ["0.bpconv", "2"]


@pytest.mark.parametrize("tracked", [True, False], ids=["trained", "never trained"])
def test_an_evaluated_network_is_exported_for_any_batch(tracked):
    network = (
        small_network(ConvNorm2d) if tracked else nn.Sequential(ConvNorm2d(3, 4, 3, padding=1))
    )
    network.eval()
    before = deepcopy(network.state_dict())
    example, shapes = (torch.randn(2, 3, 8, 8),), ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(network, example, dynamic_shapes=shapes)
    assert not exported.graph_signature.buffers_to_mutate
    for batch in (1, 5, 20):
        # For 20 images the layer that is not exported uses the Fourier engine.
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(
                exported.module()(images), network(images), rtol=1e-5, atol=1e-6
            )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_evaluated_network_becomes_onnx():
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    from onnx.reference import ReferenceEvaluator

    network = small_network(ConvNorm2d).eval()
    example, shapes = (torch.randn(2, 3, 8, 8),), ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        [found] = evaluator.run(None, {evaluator.input_names[0]: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(found), network(images), rtol=1e-4, atol=1e-5
            )
