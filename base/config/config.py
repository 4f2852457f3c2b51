"""The typed config tree: every key, its type, default, range and meaning.

A config file is JSON (`base.config.files` reads it); this module says what may stand in it. The key
names of ConvNorm are canonical, so its published config files are valid here."""

import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from base.config.adversarial import (
    DEFAULT_L2,
    AdversarialConfig,
    PGDAttackConfig,
    is_size,
    refuse_other_units,
    refuse_other_units_of_step,
)
from base.config.arguments import Choice, NameIn, OpenSection, checks_names
from base.config.imports import Import
from base.config.names import ALWAYS, metric_name, metric_of
from base.config.origins import Origins, Provenance, format_config
from base.config.section import Count, Fraction, InputPath, Needs, Positive, Section
from base.config.training import OptimizerConfig, SchedulerConfig, TrainerConfig
from base.registry import (
    ACTIVATION_LAYERS,
    CONV_LAYERS,
    DATA_LOADERS,
    LINEAR_LAYERS,
    LOSSES,
    METRICS,
    MODELS,
    NORM_LAYERS,
    TRAINERS,
    property_of,
)

DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:[0-9]{1,2})?")
LONGEST_NAME = 255
"""Bytes in the name of a folder, on all common file systems."""


def _device_name(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a device: expected auto, cpu, cuda, cuda:N or mps")
    return text


def _folder_name(text: str) -> str:
    controls = any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)
    if (
        text in ("", ".", "..")
        or "/" in text
        or "\\" in text
        or controls
        or len(text.encode()) > LONGEST_NAME
    ):
        raise ValueError(
            f"{text[:80]!r} is not the name of a folder: expected 1 to {LONGEST_NAME} bytes without slashes and line breaks"
        )
    return text


Channels = Annotated[list[Fraction], Field(min_length=1)]


CROPS = Needs(
    "augmentation.crop_padding above 0", lambda config: config.augmentation.crop_padding > 0
)
CUTOUT = Needs("augmentation.cutout above 0", lambda config: config.augmentation.cutout > 0)
BATCH_STATISTICS = Needs(
    "batch normalization", lambda config: config.arch.args.uses_batch_statistics
)

LAYER_TYPES = ("norm_layer_type", "conv_layer_type", "linear_layer_type", "activation_layer_type")
OF_EVERY_MODEL = frozenset({"num_classes", "in_channels", "mean", "std", *LAYER_TYPES})
"""Arguments of networks that `models.build_model` gives them."""
OF_EVERY_CONVOLUTION = frozenset(
    {
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode",
        "device", "dtype",
    }
)  # fmt: skip
CONV_CALL = NameIn(
    CONV_LAYERS, ("in_channels", "out_channels"), ("kernel_size", "stride", "padding", "bias")
)
LossName = Annotated[str, NameIn(LOSSES, ("logits", "labels"))]
MetricName = Annotated[str, NameIn(METRICS, ("logits", "labels"))]


LAYER_CHOICES = (
    Choice(
        "arch.args.norm_layer_type",
        NORM_LAYERS,
        frozenset({"affine"}),
        positional=1,
        others="ignored",
    ),
    Choice("arch.args.conv_layer_type", CONV_LAYERS, OF_EVERY_CONVOLUTION, others="ignored"),
    Choice(
        "arch.args.linear_layer_type",
        LINEAR_LAYERS,
        OF_EVERY_CONVOLUTION,
        positional=2,
        others="ignored",
    ),
    Choice(
        "arch.args.activation_layer_type",
        ACTIVATION_LAYERS,
        frozenset({"inplace"}),
        positional=1,
        others="ignored",
    ),
)
"""The four kinds of layers, whose own arguments stand in `arch.args` beside those of the
network."""


class ArchArgs(OpenSection):
    """Arguments of the model, and of its layers; null takes their own default."""

    choices = (Choice("arch.type", MODELS, OF_EVERY_MODEL), *LAYER_CHOICES)

    num_classes: Positive | None = None
    """Number of classes; null takes the data set's."""
    in_channels: Positive | None = None
    """Channels of the images; null takes the data set's."""
    norm_layer_type: Annotated[str, NameIn(NORM_LAYERS, ("channels",))] = "bn"
    """Norm layers."""
    conv_layer_type: Annotated[str, CONV_CALL] = "conv"
    """Convolutions; those of ConvNorm need no norm layer."""
    linear_layer_type: Annotated[str, NameIn(LINEAR_LAYERS, ("in_features", "out_features"))] = (
        "linear"
    )
    """The classifier."""
    activation_layer_type: Annotated[
        str, NameIn(ACTIVATION_LAYERS, ("channels",), ("inplace",))
    ] = "relu"
    """Activations."""
    init: Literal["default", "he", "he_zero_gn"] | None = None
    """Initial weights: PyTorch's (default); He's normal law by fan-out, as in TRADES' wide ResNets
    (he); that law for convolutions only, and weight 0 in every GroupNorm that ends a residual
    branch, as in the BatchNorm and GroupNorm study (he_zero_gn)."""
    zero_init_residual: bool | None = None
    """Residual blocks begin as their shortcuts: their last norm (in pre-activation blocks last
    convolution) has weight 0."""

    @property
    def normalizations(self) -> list[str]:
        """What normalizes between two layers, one after the other: the convolution itself, and the
        norm layer."""
        convolution, norm = self.conv_layer_type, self.norm_layer_type
        found = [convolution] if property_of(CONV_LAYERS[convolution], "normalizes", False) else []
        return [*found, norm] if property_of(NORM_LAYERS[norm], "normalizes", True) else found

    @property
    def normalizes_weights(self) -> bool:
        """Whether the convolution normalizes its weights."""
        return property_of(CONV_LAYERS[self.conv_layer_type], "normalizes_weights", False)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a layer's output depends, in training, on the other images of the batch."""
        layers = (CONV_LAYERS[self.conv_layer_type], NORM_LAYERS[self.norm_layer_type])
        return any(property_of(layer, "batch_statistics", False) for layer in layers)


class ArchConfig(Section):
    """The model."""

    type: Annotated[str, NameIn(MODELS)] = "resnet18"
    """Name of the model."""
    args: ArchArgs = ArchArgs()
    """Its arguments."""

    @property
    def chosen(self) -> dict[str, str]:
        """Dotted key -> name of the network and of the layers."""
        return {"arch.type": self.type} | {
            f"arch.args.{name}": getattr(self.args, name) for name in LAYER_TYPES
        }

    @model_validator(mode="after")
    def _arguments_fit(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.args.check(self.chosen, ("args",))
        return self


OF_THE_CONFIG = frozenset(
    {
        "seed", "subset_percent", "noise", "crop_padding", "padding_mode", "flip", "cutout", "cutout_inside",
        "cutout_fill", "device",
    }
)  # fmt: skip
"""Arguments of data loaders that other sections of the config give."""


class DataLoaderArgs(OpenSection):
    """Arguments of the data loader."""

    choices = (Choice("data_loader.type", DATA_LOADERS, OF_THE_CONFIG),)

    data_dir: InputPath | None = None
    """Folder of the data set, see docs/data.md; a data loader may need none."""
    batch_size: Positive = 128
    """Images in a minibatch, over all processes that train together."""
    shuffle: bool = True
    """A new order in every epoch."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of every class held out for validation, unless the data set has a val folder.
    0 with a val_ monitor holds out 0.1."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Worker processes that decode streamed images."""
    pin_memory: bool = False
    """Page-locked memory for streamed images."""
    num_batches: Count = 0
    """Above 0, a training epoch ends after that many batches."""
    mean: Channels | None = None
    """Per-channel mean in [0, 1]; null takes the published one for CIFAR and the training set's own
    elsewhere."""
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None
    """Per-channel standard deviation in [0, 1]; null as for mean."""


class DataLoaderConfig(Section):
    """The data set and how it is read."""

    type: Annotated[str, NameIn(DATA_LOADERS)]
    """Name of the data loader."""
    args: DataLoaderArgs = DataLoaderArgs()
    """Its arguments."""

    @model_validator(mode="after")
    def _arguments_fit(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.args.check({"data_loader.type": self.type}, ("args",))
        return self


class AugmentationConfig(Section):
    """What is done to training images, in batches on the training device."""

    crop_padding: Annotated[int, Field(ge=0, le=512)] = 4
    """Pixels added on each side before a random crop to the original size; 0 for no crop."""
    padding_mode: Annotated[Literal["zeros", "reflect"], CROPS] = "zeros"
    """What these pixels are: zeros, or the image's own, mirrored at its border (reflect)."""
    flip: bool = True
    """Random horizontal flip."""
    cutout: Annotated[int, Field(ge=0, le=8192)] = 0
    """Side in pixels of the square that is masked at a random place; 0 for none."""
    cutout_inside: Annotated[bool, CUTOUT] = False
    """The whole square lies inside the image; false: its center does, as in the paper."""
    cutout_fill: Annotated[Literal["mean", "black"], CUTOUT] = "mean"
    """Color of the square: the data's mean (0 after normalization, as in the paper), or black."""
    mixup_alpha: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Both parameters of the Beta distribution of mixup's weight; 0 for no mixup."""


class SystemConfig(Section):
    """The machine."""

    device: Annotated[str, AfterValidator(_device_name)] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """auto is bf16 autocast where the hardware has it."""
    channels_last: bool = False
    """Channels-last memory format."""
    compile: bool = False
    """torch.compile the model."""
    deterministic: bool = False
    """Deterministic algorithms only; an operation without one stops the run."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch; null leaves its choice."""
    sync_bn: Annotated[bool, BATCH_STATISTICS] = False
    """Where several processes train: batch normalization by the statistics of all their images
    instead of each one's own."""


class CometConfig(Section):
    """Logging to Comet; without this section there is none."""

    api: str | None = Field(default=None, exclude=True, repr=False)
    """API key. Better set in the environment as COMET_API_KEY; never written anywhere."""
    offline: bool = True
    """Write a zip into the run folder instead of talking to the server."""
    project: str = "convnorm"
    """Project name."""
    workspace: str | None = None
    """Workspace; null takes the account's default."""


class Config(Section):
    """One experiment."""

    name: Annotated[str, AfterValidator(_folder_name)] = "Experiment"
    """Name of the experiment: a folder in save_dir."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    n_gpu: Annotated[int, Field(ge=0, le=1024)] = 1
    """GPUs of this machine to train on, where there are any, a process on each; 0 for the CPU.
    torchrun overrules it."""
    num_classes: Positive | None = None
    """ConvNorm's second place for arch.args.num_classes; both must agree."""
    exper_name: str | None = None
    """Written by ConvNorm into its run folders; accepted and not used."""
    imports: list[Import] = Field(default=[])
    """Your own code, run before the rest of a config is read: Python files, relative to the config
    that names them, and names of modules. Those of parents come first. A run's own config names
    them with a digest; see docs/extending.md."""
    arch: ArchConfig = ArchConfig()
    data_loader: DataLoaderConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        type="SGD", args={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    )
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    train_loss: LossName = "cross_entropy"
    """Loss of training."""
    val_loss: LossName = "cross_entropy"
    """Loss reported on validation and test set."""
    metrics: list[MetricName] = Field(default=["top1", "top5"])
    """Metrics in progress and logs; of two names for one, the first is logged."""
    trainer: TrainerConfig = TrainerConfig()
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    pgd_attack: PGDAttackConfig = PGDAttackConfig()
    system: SystemConfig = SystemConfig()
    comet: CometConfig | None = None
    """Comet logging; null for none."""
    _warnings: tuple[str, ...] = PrivateAttr(default=())
    _provenance: Provenance = PrivateAttr(default=Provenance())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should be told of the way this config was put together, each in one line."""
        return self._warnings

    @field_validator("metrics")
    @classmethod
    def _one_name_per_metric(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(metric_name(name) for name in names))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inner = self.arch.args.num_classes
        if self.num_classes and inner and self.num_classes != inner:
            raise ValueError(
                f"num_classes: {self.num_classes} contradicts arch.args.num_classes: {inner}"
            )
        noisy = self.trainer.percent > 0 or self.trainer.noise_file
        for key, name in (
            ("trainer", self.trainer.monitor),
            ("lr_scheduler", self.lr_scheduler.monitor or ""),
        ):
            if "val_clean_" in name and not (noisy and self.trainer.noisy_validation):
                raise ValueError(
                    f"{key}.monitor: {name!r} is only logged where validation labels carry noise"
                )
            if "val_ema_" in name and self.trainer.ema_decay is None:
                raise ValueError(f"{key}.monitor: {name!r} is only logged with trainer.ema_decay")
            if "robust_" in name and self.robust_validation_period == 0:
                raise ValueError(
                    f"{key}.monitor: {name!r} is only logged with adversarial.validate_every above 0"
                )
            metric = metric_of(name.removeprefix("min ").removeprefix("max "))
            if metric not in (None, "off", "", *ALWAYS, *self.metrics):
                raise ValueError(
                    f"{key}.monitor: {name!r} is only logged where metrics names {metric!r}"
                )
        return self

    @model_validator(mode="after")
    def _method_takes_its_arguments(self, info: ValidationInfo) -> Self:
        if not checks_names(info.context):
            return self
        adversarial = self.adversarial
        adversarial.check(adversarial.chosen(self), ("adversarial",))
        adversarial.fill_defaults(adversarial.chosen(self))
        if adversarial.get("restarts", 1) > 1 and not adversarial.get("random_start", True):
            restarts = adversarial.get("restarts")
            raise ValueError(
                f"adversarial.restarts: {restarts} without random_start are all the same"
            )
        return self

    @model_validator(mode="after")
    def _attack_sizes(self) -> Self:
        adversarial, trainer = self.adversarial, self.trainer
        if trainer.do_adv and not self.attacks_while_training:
            raise ValueError(
                f"adversarial.method: {adversarial.method} contradicts trainer.do_adv: true"
            )
        refuse_other_units("trainer.adv_clip_eps", trainer.adv_clip_eps, "linf")
        refuse_other_units("adversarial.epsilon", adversarial.epsilon, adversarial.norm)
        epsilon = self.attack_epsilon
        refuse_other_units_of_step(
            "trainer.fgsm_step", trainer.fgsm_step, "linf", trainer.adv_clip_eps
        )
        for key, field in adversarial.known_fields().items():
            if is_size(field) and key != "epsilon":
                refuse_other_units_of_step(
                    f"adversarial.{key}", adversarial.get(key), adversarial.norm, epsilon
                )
        refuse_other_units_of_step(
            "pgd_attack.step", self.pgd_attack.step, adversarial.norm, epsilon
        )
        return self

    @property
    def adversarial_method(self) -> str:
        """The training method: a name in `base.registry.TRAINERS`. ConvNorm's do_adv asks for free
        training."""
        return self.adversarial.method or ("free" if self.trainer.do_adv else "none")

    def of_method(self, name: str, default: Any) -> Any:
        """An attribute of the training method's class; `default` where it has none, or the class is
        not known."""
        entry = TRAINERS.get(self.adversarial_method)
        return default if entry is None else property_of(entry, name, default)

    @property
    def attacks_while_training(self) -> bool:
        """Whether the training method attacks images: train_robust.py is its command then. A method
        that no table knows is taken to do so."""
        return self.of_method("attacks_while_training", self.adversarial_method not in TRAINERS)

    @property
    def attack_epsilon(self) -> float:
        """The radius of training and of attacks, as written: in 1/255 for linf, in units of the
        pixel range for l2."""
        default = self.trainer.adv_clip_eps if self.adversarial.norm == "linf" else DEFAULT_L2
        return default if self.adversarial.epsilon is None else self.adversarial.epsilon

    @property
    def attack_bn_mode(self) -> str | None:
        """The mode of the model while it is attacked in training, `train` or `eval`; None where the
        method has none."""
        return self.adversarial.get("bn_mode") or self.of_method("default_bn_mode", None)

    @property
    def robust_validation_period(self) -> int:
        """Epochs from one robust validation to the next; 0 for none."""
        every = self.adversarial.validate_every
        return int(self.attacks_while_training) if every is None else every

    @property
    def reports_robustness(self) -> bool:
        """Whether the test set is attacked after training; by default wherever a method is named,
        even if it is none."""
        report = self.adversarial.report
        return (
            self.adversarial.method is not None or self.trainer.do_adv if report is None else report
        )

    @property
    def origins(self) -> Origins:
        """Where its values come from, as far as a file or flag gave them: not values at their
        default, nor those of a config made in Python."""
        return self._provenance.origins

    def describe_origins(self) -> str:
        """The resolved tree as a config file, one line per key, with where its value came from
        beside it."""
        return format_config(self.dump(), self.origins)

    def dump(self) -> dict[str, Any]:
        """The resolved tree as plain JSON values, without secrets; validating it again gives the
        same config."""
        return self.model_dump(mode="json", exclude_none=True)
