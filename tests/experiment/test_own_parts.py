"""A user's own norm, network, loss and metric need one assignment each and no other change."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import nn

from base.base_model import BaseModel
from base.config import load_config, validate
from base.config.json_schema import readme_with_choices, reference, schema
from base.errors import ConfigError
from base.meters import check_metric
from base.registry import CONV_LAYERS, DATA_LOADERS, LOSSES, METRICS, MODELS, NORM_LAYERS
from experiment.experiment import Experiment
from models import build_model
from reports.runs import read_run
from tiny_runs import config_of, run

pytestmark = pytest.mark.usefixtures("only_few_digits")


class ResponseNorm(nn.Module):
    """Divides by the root mean square of each channel.

    Args:
        channels: the number of channels.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, eps: Annotated[float, Field(gt=0)] = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.eps = eps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * images * (images.square().mean((2, 3), keepdim=True) + self.eps).rsqrt()
        )


class Thin(BaseModel):
    """One convolution.

    Args:
        width: its channels.
    """

    def __init__(
        self, width: Annotated[int, Field(ge=1)], num_classes: int = 10, **layer_types: Any
    ) -> None:
        super().__init__(**layer_types)
        self.conv = self.conv_layer(
            self.in_channels, width, kernel_size=3, stride=2, padding=1, bias=False
        )
        self.norm, self.act = self.norm_layer(width), self.activation_layer(width)
        self.fc = self.linear_layer(width, num_classes)

    def forward_normalized(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.norm(self.conv(inputs))).mean((2, 3)))


def brier(logits, labels):
    targets = labels if labels.ndim == 2 else nn.functional.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) - targets).square().sum(1)


def top2(logits, labels):
    return (logits.topk(2).indices == labels[:, None]).sum()


OWN = {
    "arch": {
        "type": "thin",
        "args": {"width": 6, "conv_layer_type": "conv", "norm_layer_type": "response", "eps": 0.25},
    },
    "train_loss": "brier",
    "metrics": ["top2"],
    "trainer": {"epochs": 1, "monitor": "max val_top2"},
}


@pytest.fixture
def own(monkeypatch):
    for table, name, entry in (
        (NORM_LAYERS, "response", ResponseNorm),
        (MODELS, "thin", Thin),
        (LOSSES, "brier", brier),
        (METRICS, "top2", top2),
    ):
        monkeypatch.setitem(table, name, entry)


def test_a_run_of_own_parts_trains_and_is_reported_without_their_code(own, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    config = config_of(**OWN)
    assert config.warnings == ()
    assert validate(config.dump()) == config
    result = run(folder, config)
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["loss"] < 2
    assert line["top1"] <= line["top2"]
    assert line["val_top1"] <= line["val_top2"]
    assert result["test_top1"] <= result["test_top2"]
    model = build_model(config.arch.model_dump(exclude_none=True))
    assert (model.norm.eps, model.conv.out_channels) == (0.25, 6)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match=r"config.json: arch.type: 'thin' is not one of: resnet18"
    ):
        load_config(folder / "config.json")
    read = read_run(folder)
    assert read.settings["arch.type"] == "thin"
    assert read.settings["arch.args.eps"] == 0.25
    assert read.settings["trainer.monitor"] == "max val_top2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": {"args": {"eps": 0}}}, r"arch.args.eps: Input should be greater than 0, not 0"),
        ({"arch": {"args": {"esp": 0.1}}}, r"arch.args.esp: unknown key; did you mean 'eps'\?"),
        (
            {"arch": {"args": {"width": None}}},
            r"arch.args.width: required by arch.type thin, but not given",
        ),
        (
            {"arch": {"args": {"depth": 16}}},
            r"arch.args.depth: only wide_resnet takes it, not thin$",
        ),
        (
            {"arch": {"args": {"norm_layer_type": "respones"}}},
            r"'respones' is not one of: bn, gn, in, no, response; did you",
        ),
        (
            {"train_loss": "breir"},
            r"train_loss: 'breir' is not one of: cross_entropy, brier; did you mean 'brier'\?",
        ),
        (
            {"metrics": ["top3"]},
            r"metrics.0: 'top3' is not one of: top1, top5, my_metric, my_metric2, top2",
        ),
        (
            {"metrics": []},
            r"trainer.monitor: 'max val_top2' is only logged where metrics names 'top2'",
        ),
        (
            {"trainer": {"monitor": "max val_top3"}},
            r"a logged value: loss, top1, top5, top2, alone or after",
        ),
    ],
)
def test_an_error_in_a_users_part_is_one_line_that_names_it(own, change, message):
    tree = json.loads(json.dumps(OWN))
    for section, values in change.items():
        if section == "arch":
            tree["arch"]["args"] |= values["args"]
        else:
            tree[section] = values if section != "trainer" else {**tree["trainer"], **values}
    with pytest.raises(ConfigError, match=message):
        config_of(**tree)


def test_an_argument_of_a_users_layer_has_no_effect_on_other_layers(own):
    (warning,) = config_of(arch={"args": {"eps": 0.5, "norm_layer_type": "no"}}).warnings
    assert (
        warning == "without effect in this run: arch.args.eps 0.5"
        " (only with arch.args.norm_layer_type response)"
    )


def test_schema_reference_and_readme_know_own_parts(own):
    properties = schema()["$defs"]["ArchArgs"]["properties"]
    names, anything, null = properties["norm_layer_type"]["anyOf"]
    assert names["enum"] == list(NORM_LAYERS)
    assert (anything, null) == ({"type": "string"}, {"type": "null"})
    eps = properties["eps"]
    assert {"exclusiveMinimum": 0, "type": "number"} in eps["anyOf"]
    assert eps["description"] == "response: added to the mean square."
    assert "| `eps` | number > 0 | `1e-06` | response: added to the mean square. |" in reference()
    assert "| `width` | integer ≥ 1 | required | thin: its channels. |" in reference()
    assert "| `arch.type` | `thin` | One convolution. |" in reference()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "`top2`" in readme_with_choices(readme)


def no_arguments():
    """A norm layer that forgot its channels."""


def test_an_entry_that_cannot_be_called_as_its_table_says_is_one_line(monkeypatch):
    monkeypatch.setitem(NORM_LAYERS, "broken", no_arguments)
    monkeypatch.setitem(LOSSES, "broken", lambda logits: logits)
    with pytest.raises(
        ConfigError,
        match=r"norm_layer_type: 'broken' cannot be called as \(channels\): too many positional",
    ):
        config_of(arch={"args": {"norm_layer_type": "broken"}})
    with pytest.raises(
        ConfigError, match=r"val_loss: 'broken' cannot be called as \(logits, labels\): too many"
    ):
        config_of(val_loss="broken")


def test_a_data_loader_with_a_default_for_its_folder_needs_none(monkeypatch):
    class Folderless(DATA_LOADERS["DigitsDataLoader"]):
        """Digits of another hand."""

        def __init__(self, hand: str = "left", **options: Any) -> None:
            super().__init__(**options)

    monkeypatch.setitem(DATA_LOADERS, "Folderless", Folderless)
    config = validate({"data_loader": {"type": "Folderless", "args": {"hand": "right"}}})
    assert config.data_loader.args.get("hand") == "right"
    with pytest.raises(
        ConfigError, match=r"data_loader.args.hand: only Folderless takes it, not DigitsDataLoader$"
    ):
        validate({"data_loader": {"type": "DigitsDataLoader", "args": {"hand": "right"}}})
    with pytest.raises(
        ConfigError,
        match=r"data_loader.args.data_dir: required by data_loader.type CIFAR10DataLoader, but not",
    ):
        validate({"data_loader": {"type": "CIFAR10DataLoader"}})


class Average(BaseModel):
    """A network that has no layers to choose."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, mean=None, std=None) -> None:
        super().__init__(in_channels=in_channels, mean=mean, std=std)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward_normalized(self, inputs):
        return self.classifier(inputs.mean(dim=(2, 3)))


def test_a_network_without_layers_to_choose_trains_and_refuses_layer_types(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "average", Average)
    usual = {"norm_layer_type": "bn", "conv_layer_type": "conv"}
    config = config_of(arch={"type": "average", "args": usual}, trainer={"epochs": 1})
    assert isinstance(build_model(config.arch.model_dump(exclude_none=True)), Average)
    run(tmp_path / "run", config)
    with pytest.raises(
        ConfigError, match="arch.args.norm_layer_type: average takes no such argument"
    ):
        build_model(
            config_of(arch={"type": "average", "args": {"norm_layer_type": "gn"}}).arch.model_dump()
        )


def test_a_convolution_names_its_channels_as_it_likes(monkeypatch, tmp_path):
    def convolution(planes, filters, power: float, **others):
        return nn.Conv2d(planes, filters, **others)

    monkeypatch.setitem(CONV_LAYERS, "own", convolution)
    layers = {"conv_layer_type": "own", "power": 2.0}
    assert config_of(arch={"args": layers}).arch.args.get("power") == 2
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of().dump()))
    with pytest.raises(
        ConfigError,
        match=r"^--set arch.args.conv_layer_type=own: arch.args.power: required by"
        r" arch.args.conv_layer_type own, but not given$",
    ):
        load_config(file, [("arch.args.conv_layer_type", "own")])


def test_a_network_that_is_no_base_model_is_one_line(monkeypatch):
    monkeypatch.setitem(MODELS, "plain", lambda num_classes: nn.Linear(3, num_classes))
    with pytest.raises(
        ConfigError, match=r"^arch\.type: plain makes a Linear, which is not a base\.base_model\."
    ):
        build_model({"type": "plain", "args": {"num_classes": 10}})


def test_a_norm_that_makes_no_layer_is_one_line(monkeypatch):
    monkeypatch.setitem(NORM_LAYERS, "nothing", lambda channels: None)
    with pytest.raises(
        ConfigError,
        match=r"arch.type: \w+ cannot be trained on .* 'NoneType' object is not callable",
    ):
        run(None, config_of(arch={"args": {"norm_layer_type": "nothing"}}))


def mean_loss(logits, labels):
    return nn.functional.cross_entropy(logits, labels)


def fraction(logits, labels):
    return (logits.argmax(1) == labels).float().mean()


def confidences(logits, labels):
    """The sum of the probabilities of the labels: no integer, but a sum over samples."""
    targets = labels if labels.ndim == 2 else nn.functional.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) * targets).sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"val_loss": "own"},
            r"val_loss: 'own' must return one loss per sample, of shape \(20,\), not \(\)$",
        ),
        ({"train_loss": "own"}, r"train_loss: 'own' must return one loss per sample"),
        (
            {"metrics": ["fraction"]},
            r"metrics: 'fraction' must return a tensor without dimensions, the number of correct"
            r" samples of the batch, not 1 for 20 samples and 1 for the same samples twice$",
        ),
        ({"metrics": ["percent"]}, r"metrics: 'percent' must return .*, not 100 for 20 samples$"),
        ({"metrics": ["all"]}, r"metrics: 'all' must return .*, not 1 for 20 samples and 1 for"),
        ({"metrics": ["vector"]}, r"metrics: 'vector' must return .*, not one of shape \(20,\)$"),
        ({"metrics": ["int"]}, r"metrics: 'int' must return .*, not a value of type int$"),
    ],
)
def test_a_loss_or_metric_that_is_no_sum_over_samples_is_refused_before_training(
    monkeypatch, settings, message
):
    monkeypatch.setitem(LOSSES, "own", mean_loss)
    for name, metric in {
        "fraction": fraction,
        "percent": lambda logits, labels: 100 * fraction(logits, labels),
        "all": lambda logits, labels: (logits.argmax(1) == labels).all(),
        "vector": lambda logits, labels: logits.argmax(1) == labels,
        "int": lambda logits, labels: int((logits.argmax(1) == labels).sum()),
    }.items():
        monkeypatch.setitem(METRICS, name, metric)
    with pytest.raises(ConfigError, match=rf"^{message}"):
        Experiment.from_config(config_of(**settings))


@pytest.mark.parametrize("classes", [3, 6, 64])
def test_a_metric_may_be_one_for_every_sample_up_to_rounding(classes):
    labels = torch.arange(classes)
    logits = nn.functional.one_hot(labels).float()
    check_metric("mass", lambda logits, labels: logits.softmax(1).sum(), logits, labels)


def test_a_metric_may_be_a_sum_of_fractions(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "confidences", confidences)
    mixed = {"mixup_alpha": 0.5}
    config = config_of(metrics=["confidences"], augmentation=mixed, trainer={"epochs": 1})
    result = run(tmp_path / "run", config)
    assert 0 < result["test_confidences"] < 1
