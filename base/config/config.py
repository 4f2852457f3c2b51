"""The typed config tree: every key, its type, default, range and meaning.

`base.config.files` reads config files, which are JSON. ConvNorm's key names are canonical, so its
published config files are valid here.
"""

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
    check_epsilon_units,
    check_step_units,
    is_size,
)
from base.config.arguments import Choice, NameIn, OpenSection, checks_names
from base.config.imports import Import
from base.config.logged_values import ALWAYS, metric_name, metric_of
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
    attribute_of,
)

DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|cuda(:[0-9]{1,2})?")
MAX_NAME_BYTES = 255
"""The longest name of a folder that all common file systems allow."""


def _check_device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a device: expected auto, cpu, cuda, cuda:N or mps")
    return text


def _check_folder_name(text: str) -> str:
    # A run folder may be copied to Windows, where a backslash separates folders
    has_separator = "/" in text or "\\" in text
    has_control = any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)
    is_too_long = len(text.encode()) > MAX_NAME_BYTES
    if text in ("", ".", "..") or has_separator or has_control or is_too_long:
        raise ValueError(
            f"{text[:80]!r} is not the name of a folder: expected 1 to {MAX_NAME_BYTES} bytes"
            " without slashes or line breaks"
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
MODEL_CONTRACT = frozenset({"num_classes", "in_channels", "mean", "std", *LAYER_TYPES})
"""Arguments that `models.build_model` gives to networks."""
CONVOLUTION_CONTRACT = frozenset(
    {
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "bias", "padding_mode", "device", "dtype",
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
    Choice(
        "arch.args.conv_layer_type",
        CONV_LAYERS,
        CONVOLUTION_CONTRACT,
        positional=2,
        others="ignored",
    ),
    Choice(
        "arch.args.linear_layer_type",
        LINEAR_LAYERS,
        CONVOLUTION_CONTRACT,
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
"""The four kinds of layers, whose own arguments are in `arch.args` with those of the network."""


class ArchArgs(OpenSection):
    """Arguments of the model and of its layers; null takes their own default."""

    choices = (Choice("arch.type", MODELS, MODEL_CONTRACT), *LAYER_CHOICES)

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
    """Initial weights. default: PyTorch's. he: He's normal distribution by fan-out, as in TRADES'
    wide ResNets. he_zero_gn: the same for convolutions only, and weight 0 in every GroupNorm that
    ends a residual branch, as in the study of BatchNorm and GroupNorm."""
    zero_init_residual: bool | None = None
    """Residual blocks start as their shortcuts: the last norm layer of each (in pre-activation
    blocks the last convolution) has weight 0."""

    @property
    def normalizations(self) -> list[str]:
        """The types of the layers that normalize in each block: convolution, norm layer."""
        found = []
        if attribute_of(CONV_LAYERS[self.conv_layer_type], "normalizes", False):
            found.append(self.conv_layer_type)
        if attribute_of(NORM_LAYERS[self.norm_layer_type], "normalizes", True):
            found.append(self.norm_layer_type)
        return found

    @property
    def normalizes_weights(self) -> bool:
        """Whether the convolution normalizes its weights."""
        return attribute_of(CONV_LAYERS[self.conv_layer_type], "normalizes_weights", False)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the output of a layer in training depends on the other images of the batch."""
        layers = (CONV_LAYERS[self.conv_layer_type], NORM_LAYERS[self.norm_layer_type])
        return any(attribute_of(layer, "batch_statistics", False) for layer in layers)


class ArchConfig(Section):
    """The model."""

    type: Annotated[str, NameIn(MODELS)] = "resnet18"
    """Name of the model."""
    args: ArchArgs = ArchArgs()
    """Arguments of the model and its layers."""

    @property
    def chosen(self) -> dict[str, str]:
        """Dotted key -> name of the network or layer that it chooses."""
        layers = {f"arch.args.{name}": getattr(self.args, name) for name in LAYER_TYPES}
        return {"arch.type": self.type, **layers}

    @model_validator(mode="after")
    def _check_arguments(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.args.check(self.chosen, ("args",))
        return self


DATA_LOADER_CONTRACT = frozenset(
    {
        "seed", "subset_percent", "noise", "crop_padding", "padding_mode", "flip", "cutout",
        "cutout_inside", "cutout_fill", "device",
    }
)  # fmt: skip
"""Arguments of data loaders that come from other sections of the config."""


class DataLoaderArgs(OpenSection):
    """Arguments of the data loader."""

    choices = (Choice("data_loader.type", DATA_LOADERS, DATA_LOADER_CONTRACT),)

    data_dir: InputPath | None = None
    """Folder of the data set, see docs/data.md; some data loaders need none."""
    batch_size: Positive = 128
    """Images in a minibatch, summed over all processes."""
    shuffle: bool = True
    """Read training images in a new order in every epoch."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of every class that is held out for validation, unless the data set has a val
    folder. If it is 0 and the monitor is a val_ value, 0.1 is held out."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Worker processes that decode streamed images."""
    pin_memory: bool = False
    """Copy batches of decoding processes straight into page-locked memory."""
    num_batches: Count = 0
    """If above 0, a training epoch ends after that many batches."""
    mean: Channels | None = None
    """Mean of each channel in [0, 1]; null takes the published values for CIFAR, and those of the
    training set for other data."""
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None
    """Standard deviation of each channel in [0, 1]; null as for mean."""


class DataLoaderConfig(Section):
    """The data set and how it is read."""

    type: Annotated[str, NameIn(DATA_LOADERS)]
    """Name of the data loader."""
    args: DataLoaderArgs = DataLoaderArgs()
    """Arguments of the data loader."""

    @model_validator(mode="after")
    def _check_arguments(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.args.check({"data_loader.type": self.type}, ("args",))
        return self


class AugmentationConfig(Section):
    """Augmentation of training images, in batches on the training device."""

    crop_padding: Annotated[int, Field(ge=0, le=512)] = 4
    """Pixels added on each side before a random crop to the original size; 0 for no crop."""
    padding_mode: Annotated[Literal["zeros", "reflect"], CROPS] = "zeros"
    """Values of these pixels: zeros, or the image mirrored at its border (reflect)."""
    flip: bool = True
    """Random horizontal flip."""
    cutout: Annotated[int, Field(ge=0, le=8192)] = 0
    """Side in pixels of a square that is masked at a random place; 0 for none."""
    cutout_inside: Annotated[bool, CUTOUT] = False
    """Keep the whole square inside the image; false: only its center, as in the paper."""
    cutout_fill: Annotated[Literal["mean", "black"], CUTOUT] = "mean"
    """Color of the square: the mean of the data (0 after normalization, as in the paper), or
    black."""
    mixup_alpha: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Both parameters of the Beta distribution from which mixup draws its weight; 0 for no
    mixup."""


class SystemConfig(Section):
    """The machine."""

    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """tf32: multiply and convolve float32 in TF32 on CUDA; bf16: autocast; auto: bf16 if the
    hardware multiplies it natively, otherwise fp32."""
    channels_last: bool = False
    """Store tensors in the channels-last memory format."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Use deterministic algorithms only; an operation that has none stops the run."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch; null leaves the choice to torch."""
    sync_bn: Annotated[bool, BATCH_STATISTICS] = False
    """With several processes, batch normalization uses the statistics of the images of all of them;
    false: each process uses those of its own images."""
    gradient_compression: Literal["bf16"] | None = None
    """With several processes, the precision in which gradients are sent: bf16 halves the traffic
    and rounds every gradient; null: that of the weights. One process sends none."""


class CometConfig(Section):
    """Logging to Comet; without this section nothing is logged there."""

    api: str | None = Field(default=None, exclude=True, repr=False)
    """API key, which is never written to a file. Prefer the environment variable COMET_API_KEY."""
    offline: bool = True
    """Write a zip file to the run folder instead of sending data to the server."""
    project: str = "convnorm"
    """Project name."""
    workspace: str | None = None
    """Workspace; null takes the default of the account."""


class Config(Section):
    """One experiment."""

    name: Annotated[str, AfterValidator(_check_folder_name)] = "Experiment"
    """Name of the experiment, which is also a folder in save_dir."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    n_gpu: Annotated[int, Field(ge=0, le=1024)] = 1
    """Number of this machine's GPUs to train on, with one process on each; 0 for the CPU. A machine
    without GPUs uses the CPU. torchrun overrides it."""
    num_classes: Positive | None = None
    """ConvNorm's second key for arch.args.num_classes; both must agree."""
    exper_name: str | None = None
    """ConvNorm writes it to its run folders; accepted, but not used."""
    imports: list[Import] = Field(default=[])
    """Your own code, which is imported before the rest of the config is read: Python files,
    relative to the config that names them, and names of modules. Those of parent configs come
    first. The config in a run folder adds a digest; see docs/extending.md."""
    arch: ArchConfig = ArchConfig()
    data_loader: DataLoaderConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        type="SGD", args={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    )
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    train_loss: LossName = "cross_entropy"
    """Loss in training."""
    val_loss: LossName = "cross_entropy"
    """Loss that is reported on the validation and test sets."""
    metrics: list[MetricName] = Field(default=["top1", "top5"])
    """Metrics in the progress bar and the logs. If a metric has two names, the first is logged."""
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
        """Warnings for the user about this config, each in one line."""
        return self._warnings

    @field_validator("metrics")
    @classmethod
    def _use_canonical_names(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(metric_name(name) for name in names))

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        inner = self.arch.args.num_classes
        if self.num_classes and inner and self.num_classes != inner:
            raise ValueError(
                f"num_classes: {self.num_classes} contradicts arch.args.num_classes: {inner}"
            )
        if self.trainer.do_adv and not self.attacks_while_training:
            raise ValueError(
                f"adversarial.method: {self.adversarial.method} contradicts trainer.do_adv: true"
            )
        self._check_monitor("trainer.monitor", self.trainer.monitor)
        self._check_monitor("lr_scheduler.monitor", self.lr_scheduler.monitor or "off")
        return self

    def _check_monitor(self, key: str, monitor: str) -> None:
        """Check that a run of this config logs the value that it watches."""
        condition = None
        has_noise = self.trainer.percent > 0 or self.trainer.noise_file is not None
        if "val_clean_" in monitor and not (has_noise and self.trainer.noisy_validation):
            condition = "where validation labels carry noise"
        elif "val_ema_" in monitor and self.trainer.ema_decay is None:
            condition = "with trainer.ema_decay"
        elif "robust_" in monitor and self.robust_validation_period == 0:
            condition = "with adversarial.validate_every above 0"
        else:
            metric = metric_of(monitor.removeprefix("min ").removeprefix("max "))
            if metric not in (None, "off", *ALWAYS, *self.metrics):
                condition = f"where metrics names {metric!r}"
        if condition is not None:
            raise ValueError(f"{key}: {monitor!r} is only logged {condition}")

    @model_validator(mode="after")
    def _check_method_arguments(self, info: ValidationInfo) -> Self:
        if not checks_names(info.context):
            return self
        # Not in the section's own validator, because trainer.do_adv may choose the method
        adversarial = self.adversarial
        adversarial.check(adversarial.chosen(self), ("adversarial",))
        adversarial.fill_defaults(adversarial.chosen(self))
        restarts = adversarial.get("restarts", 1)
        if restarts > 1 and not adversarial.get("random_start", True):
            raise ValueError(
                f"adversarial.restarts: {restarts} without random_start are all the same"
            )
        return self

    @model_validator(mode="after")
    def _check_attack_sizes(self, info: ValidationInfo) -> Self:
        adversarial = self.adversarial
        trainer = self.trainer
        check_epsilon_units("trainer.adv_clip_eps", trainer.adv_clip_eps, "linf")
        check_epsilon_units("adversarial.epsilon", adversarial.epsilon, adversarial.norm)
        epsilon = self.attack_epsilon
        check_step_units("trainer.fgsm_step", trainer.fgsm_step, "linf", trainer.adv_clip_eps)
        check_step_units("pgd_attack.step", self.pgd_attack.step, adversarial.norm, epsilon)
        # The method's own sizes may have any type where names are not checked
        if checks_names(info.context):
            for key, field in adversarial.known_fields().items():
                if is_size(field) and key != "epsilon":
                    check_step_units(
                        f"adversarial.{key}", adversarial.get(key), adversarial.norm, epsilon
                    )
        return self

    @property
    def adversarial_method(self) -> str:
        """The training method, a name in `base.registry.TRAINERS`."""
        if self.adversarial.method is not None:
            return self.adversarial.method
        # ConvNorm has one method, which do_adv switches on
        return "free" if self.trainer.do_adv else "none"

    def method_attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the training method's class.

        Args:
            name: the attribute.
            default: the value if the class does not have it, or is not registered.
        """
        entry = TRAINERS.get(self.adversarial_method)
        if entry is None:
            return default
        return attribute_of(entry, name, default)

    @property
    def attacks_while_training(self) -> bool:
        """Whether the training method attacks images, so that train_robust.py is its command."""
        # Reports read configs of methods that are not registered, and most methods attack
        return self.method_attribute(
            "attacks_while_training", self.adversarial_method not in TRAINERS
        )

    @property
    def attack_epsilon(self) -> float:
        """The radius of training and of attacks in the config's units: 1/255 of the pixel range for
        linf, the pixel range for l2."""
        if self.adversarial.epsilon is not None:
            return self.adversarial.epsilon
        return self.trainer.adv_clip_eps if self.adversarial.norm == "linf" else DEFAULT_L2

    @property
    def attack_bn_mode(self) -> str | None:
        """The mode of the model during an attack in training, `train` or `eval`; None if the method
        has no such mode."""
        return self.adversarial.get("bn_mode") or self.method_attribute("default_bn_mode", None)

    @property
    def robust_validation_period(self) -> int:
        """Epochs from one robust validation to the next; 0 for none."""
        if self.adversarial.validate_every is not None:
            return self.adversarial.validate_every
        return 1 if self.attacks_while_training else 0

    @property
    def reports_robustness(self) -> bool:
        """Whether the test set is attacked after training."""
        if self.adversarial.report is not None:
            return self.adversarial.report
        # The method `none` counts, too: it is the baseline of a comparison of methods
        return self.adversarial.method is not None or self.trainer.do_adv

    @property
    def origins(self) -> Origins:
        """The file or flag that gave each value; values without one are defaults, or were given in
        Python."""
        return self._provenance.origins

    def describe_origins(self) -> str:
        """Return the resolved tree as a config file that shows where each value came from."""
        return format_config(self.dump(), self.origins)

    def dump(self) -> dict[str, Any]:
        """Return the resolved tree as plain JSON values, without secrets.

        Validating it again gives the same config.
        """
        return self.model_dump(mode="json", exclude_none=True)
