"""The typed config tree: every key, its type, default, range and meaning.

A config file is JSON (`base.config.files` reads it); this module says what may stand in it. The key names of ConvNorm are
canonical, so its published config files are valid here.
"""

import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from base.config.adversarial import (
    DEFAULT_L2,
    AdversarialConfig,
    PGDAttackConfig,
    refuse_other_units,
    refuse_other_units_of_step,
)
from base.config.imports import Import
from base.config.names import (
    CONV_NORM,
    METRIC_ALIASES,
    ActivationName,
    ArchName,
    ConvName,
    DataLoaderName,
    MetricName,
    NormName,
)
from base.config.origins import Origins, Provenance, format_config
from base.config.section import Count, Fraction, InputPath, Needs, Positive, Section
from base.config.training import OptimizerConfig, SchedulerConfig, TrainerConfig

DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:[0-9]{1,2})?")
LONGEST_NAME = 255
"""Bytes in the name of a folder, on all common file systems."""


def _device_name(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a device: expected auto, cpu, cuda, cuda:N or mps")
    return text


def _folder_name(text: str) -> str:
    controls = any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)
    if text in ("", ".", "..") or "/" in text or "\\" in text or controls or len(text.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{text[:80]!r} is not the name of a folder: expected 1 to {LONGEST_NAME} bytes without slashes and line breaks"
        )
    return text


Channels = Annotated[list[Fraction], Field(min_length=3, max_length=3)]


ONI = Needs("arch.args.conv_layer_type oni_conv", lambda config: config.arch.args.conv_layer_type == "oni_conv")
PREACT = Needs("arch.type preact_resnet18", lambda config: config.arch.type == "preact_resnet18")
CROPS = Needs("augmentation.crop_padding above 0", lambda config: config.augmentation.crop_padding > 0)
CUTOUT = Needs("augmentation.cutout above 0", lambda config: config.augmentation.cutout > 0)
GROUPS = Needs("arch.args.norm_layer_type gn", lambda config: config.arch.args.norm_layer_type == "gn")
BATCH_STATISTICS = Needs("batch normalization", lambda config: {"bn", "ConvNorm"} & set(config.arch.args.normalizations))


class ArchArgs(Section):
    """Arguments of the model; null takes the model's own default."""

    num_classes: Positive | None = None
    """Number of classes; null takes the data set's."""
    in_channels: Positive | None = None
    """Channels of the images; null takes the data set's."""
    norm_layer_type: NormName = "bn"
    """bn BatchNorm, gn GroupNorm, in InstanceNorm, no none."""
    conv_layer_type: ConvName = "conv"
    """conv plain, prec_conv or conv_norm ConvNorm, sn_conv spectral normalization, oni_conv ONI, own_conv OWN."""
    linear_layer_type: Literal["linear"] = "linear"
    """Type of the classifier."""
    activation_layer_type: ActivationName = "relu"
    """relu, or srelu: shifted ReLU with a learnt threshold per channel."""
    norm_groups: Annotated[Positive | None, GROUPS] = None
    """Groups of gn; fewer are used where the channels do not divide. Default 32."""
    oni_rule: Annotated[Literal["paper", "original"] | None, ONI] = None
    """oni_conv with more outputs than inputs: paper (default) or original (as ConvNorm's code)."""
    stem: Literal["cifar", "imagenet"] | None = None
    """First layers of a ResNet: 3x3 (cifar, the default) or 7x7 with stride and pooling (imagenet)."""
    shortcut_input: Annotated[Literal["activated", "raw"] | None, PREACT] = None
    """preact_resnet18: its shortcuts see relu(bn(x)) (activated, default) or x itself (raw)."""
    final_norm: Annotated[bool | None, PREACT] = None
    """preact_resnet18: whether norm and activation stand before the average; default true."""
    depth: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Depth of wide_resnet: 6 n + 4."""
    widen_factor: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Width factor of wide_resnet."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout rate inside the blocks of a wide ResNet."""
    init: Literal["default", "he", "he_zero_gn"] | None = None
    """Initial weights: PyTorch's (default); He's normal law by fan-out, as in TRADES' wide ResNets
    (he); that law for convolutions only, and weight 0 in every GroupNorm that ends a residual branch,
    as in the BatchNorm and GroupNorm study (he_zero_gn)."""
    zero_init_residual: bool | None = None
    """Residual blocks begin as their shortcuts: their last norm (in pre-activation blocks last convolution) has weight 0."""

    @property
    def normalizations(self) -> list[str]:
        """What normalizes between two layers, one after the other: ConvNorm's convolution, and the norm layer."""
        convolution = ["ConvNorm"] if self.conv_layer_type in CONV_NORM else []
        return convolution if self.norm_layer_type == "no" else [*convolution, self.norm_layer_type]


class ArchConfig(Section):
    """The model."""

    type: ArchName = "resnet18"
    """Name of the model."""
    args: ArchArgs = ArchArgs()
    """Its arguments."""


class DataLoaderArgs(Section):
    """Arguments of the data loader."""

    data_dir: InputPath | None = None
    """Folder of the data set, see docs/data.md; DigitsDataLoader needs none."""
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
    """Per-channel mean in [0, 1]; null takes the published one for CIFAR and the training set's own elsewhere."""
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)] | None = None
    """Per-channel standard deviation in [0, 1]; null as for mean."""
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    """ImageFolderDataLoader: side in pixels that images are resized and cropped to; null: all have one size already."""
    in_memory: bool | None = None
    """ImageFolderDataLoader: keep all images decoded in memory; null decides by size."""
    test_split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """ImageFolderDataLoader: part of every class that is the test set where data_dir holds class
    folders only; null: 0.2."""


class DataLoaderConfig(Section):
    """The data set and how it is read."""

    type: DataLoaderName
    """Name of the data loader."""
    args: DataLoaderArgs = DataLoaderArgs()
    """Its arguments."""

    @model_validator(mode="after")
    def _has_data_dir(self) -> Self:
        if self.type != "DigitsDataLoader" and self.args.data_dir is None:
            raise ValueError("args.data_dir: required: the folder of the data set")
        if self.type != "ImageFolderDataLoader":
            for name in ("image_size", "in_memory", "test_split"):
                if getattr(self.args, name) is not None:
                    raise ValueError(f"args.{name}: only ImageFolderDataLoader takes it, not {self.type}")
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
    """The whole square lies inside the image; false: its centre does, as in the paper."""
    cutout_fill: Annotated[Literal["mean", "black"], CUTOUT] = "mean"
    """Colour of the square: the data's mean (0 after normalization, as in the paper), or black."""
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
    """Where several processes train: batch normalisation by the statistics of all their images instead of each one's own."""


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
    """GPUs of this machine to train on, where there are any, a process on each; 0 for the CPU. torchrun overrules it."""
    num_classes: Positive | None = None
    """ConvNorm's second place for arch.args.num_classes; both must agree."""
    exper_name: str | None = None
    """Written by ConvNorm into its run folders; accepted and not used."""
    imports: list[Import] = Field(default=[])
    """Own code that is run before the rest of a config is read: Python files, relative to the config that names them, and
    names of modules. Those of parents come first. A run's own config names them with a digest; see docs/extending.md."""
    arch: ArchConfig = ArchConfig()
    data_loader: DataLoaderConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(type="SGD", args={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    train_loss: Literal["cross_entropy"] = "cross_entropy"
    """Loss of training."""
    val_loss: Literal["cross_entropy"] = "cross_entropy"
    """Loss reported on validation and test set."""
    metrics: list[MetricName] = Field(default=["top1", "top5"])
    """Metrics in progress and logs; my_metric is top1, my_metric2 is top5."""
    trainer: TrainerConfig = TrainerConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
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
        return list(dict.fromkeys(METRIC_ALIASES.get(name, name) for name in names))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inner = self.arch.args.num_classes
        if self.num_classes and inner and self.num_classes != inner:
            raise ValueError(f"num_classes: {self.num_classes} contradicts arch.args.num_classes: {inner}")
        noisy = self.trainer.percent > 0 or self.trainer.noise_file
        for key, name in (("trainer", self.trainer.monitor), ("lr_scheduler", self.lr_scheduler.monitor or "")):
            if "val_clean_" in name and not (noisy and self.trainer.noisy_validation):
                raise ValueError(f"{key}.monitor: {name!r} is only logged where validation labels carry noise")
            if "val_ema_" in name and self.trainer.ema_decay is None:
                raise ValueError(f"{key}.monitor: {name!r} is only logged with trainer.ema_decay")
            if "robust_" in name and self.robust_validation_period == 0:
                raise ValueError(f"{key}.monitor: {name!r} is only logged with adversarial.validate_every above 0")
        return self

    @model_validator(mode="after")
    def _attack_sizes(self) -> Self:
        adversarial, trainer = self.adversarial, self.trainer
        if adversarial.method == "none" and trainer.do_adv:
            raise ValueError("adversarial.method: none contradicts trainer.do_adv: true")
        if self.adversarial_method == "free" and adversarial.bn_mode == "eval":
            raise ValueError("adversarial.bn_mode: free training attacks by its training pass: only train is possible")
        refuse_other_units("trainer.adv_clip_eps", trainer.adv_clip_eps, "linf")
        refuse_other_units("adversarial.epsilon", adversarial.epsilon, adversarial.norm)
        epsilon = self.attack_epsilon
        refuse_other_units_of_step("trainer.fgsm_step", trainer.fgsm_step, "linf", trainer.adv_clip_eps)
        refuse_other_units_of_step("adversarial.step_size", adversarial.step_size, adversarial.norm, epsilon)
        refuse_other_units_of_step("pgd_attack.step", self.pgd_attack.step, adversarial.norm, epsilon)
        return self

    @property
    def adversarial_method(self) -> str:
        """The training method: `none`, `free`, `fgsm`, `pgd` or `trades`."""
        return self.adversarial.method or ("free" if self.trainer.do_adv else "none")

    @property
    def attack_epsilon(self) -> float:
        """The radius of training and of attacks, as written: in 1/255 for linf, in units of the pixel range for l2."""
        default = self.trainer.adv_clip_eps if self.adversarial.norm == "linf" else DEFAULT_L2
        return default if self.adversarial.epsilon is None else self.adversarial.epsilon

    @property
    def attack_bn_mode(self) -> str:
        """The mode of the model while it is attacked in training: `train` or `eval`."""
        return self.adversarial.bn_mode or ("eval" if self.adversarial_method == "trades" else "train")

    @property
    def robust_validation_period(self) -> int:
        """Epochs from one robust validation to the next; 0 for none."""
        every = self.adversarial.validate_every
        return int(self.adversarial_method != "none") if every is None else every

    @property
    def reports_robustness(self) -> bool:
        """Whether the test set is attacked after training; by default wherever a method is named, even if it is none."""
        report = self.adversarial.report
        return self.adversarial.method is not None or self.trainer.do_adv if report is None else report

    @property
    def origins(self) -> Origins:
        """Where its values come from; of those at their default, and of a config that was put together in Python, nothing."""
        return self._provenance.origins

    def describe_origins(self) -> str:
        """The resolved tree as a config file, one line per key, with where its value came from beside it."""
        origins = {path: origin for path, origin in self.origins.items() if path[0] != "imports"}
        if self.imports:
            origins["imports",] = "imports of the config and its parents, and --imports"
        return format_config(self.dump(), origins)

    def dump(self) -> dict[str, Any]:
        """The resolved tree as plain JSON values, without secrets; validating it again gives the same config."""
        return self.model_dump(mode="json", exclude_none=True)
