"""The config's sections on training: optimizer, schedule, and the training loop."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from base.config.adversarial import Size
from base.config.arguments import checks_names
from base.config.logged_values import describe_logged_values, logged_value
from base.config.section import Count, FilePath, Fraction, InputPath, Needs, Positive, Section

A_SCHEDULE = Needs("an lr_scheduler.type", lambda config: config.lr_scheduler.type != "none")
A_PLATEAU = Needs(
    "ReduceLROnPlateau", lambda config: config.lr_scheduler.type == "ReduceLROnPlateau"
)
A_MONITOR = Needs(
    "a trainer.monitor other than off", lambda config: config.trainer.monitor != "off"
)
A_RATE = Needs("trainer.percent above 0", lambda config: config.trainer.percent > 0)
SYMMETRIC_NOISE = Needs(
    "trainer.sym and trainer.percent above 0",
    lambda config: config.trainer.sym and A_RATE.met(config),
)
NOISE = Needs(
    "label noise", lambda config: A_RATE.met(config) or config.trainer.noise_file is not None
)
A_PENALTY = Needs("trainer.OCNN", lambda config: config.trainer.OCNN)
FREE = Needs(
    "free adversarial training",
    lambda config: "trainer.adv_repeats" in config.method_attribute("reads", ()),
)
FREE_STEP = Needs(
    "free adversarial training under linf and without adversarial.step_size",
    lambda config: (
        FREE.met(config)
        and config.adversarial.norm == "linf"
        and config.adversarial.get("step_size") is None
    ),
)
NO_EPSILON = Needs(
    "adversarial.norm linf and without adversarial.epsilon",
    lambda config: config.adversarial.norm == "linf" and config.adversarial.epsilon is None,
)


class OptimizerConfig(Section):
    """The optimizer; without this section SGD with lr 0.1, momentum 0.9 and weight decay 5e-4."""

    type: str = "SGD"
    """Name of a class of torch.optim, or module.Class of your own imported code."""
    args: dict[str, Any] = Field(default={})
    """Its arguments, checked against its signature. Those that are not given have its defaults."""


class SchedulerConfig(Section):
    """The learning-rate schedule."""

    type: str = "none"
    """Name of a class of torch.optim.lr_scheduler, module.Class of your own imported code, or
    none."""
    args: Annotated[dict[str, Any], A_SCHEDULE] = Field(default={})
    """Its arguments. T_max of CosineAnnealingLR, total_steps of OneCycleLR and total_iters of
    PolynomialLR default to the length of the run, or, in a SequentialLR, to the steps between its
    milestones. mode of ReduceLROnPlateau defaults to the better direction of its monitor."""
    interval: Annotated[Literal["epoch", "batch"] | None, A_SCHEDULE] = None
    """Step after every batch or every epoch; null: batch for OneCycleLR and CyclicLR, epoch for the
    others."""
    monitor: Annotated[str | None, A_PLATEAU] = None
    """The value that ReduceLROnPlateau watches; null: val_loss, or loss without a validation
    set."""

    @field_validator("monitor")
    @classmethod
    def _check_monitor(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is None or not checks_names(info.context):
            return name
        known = logged_value(name)
        if known is None:
            raise ValueError(f"{name!r} is not a logged value: {describe_logged_values()}")
        return known

    @model_validator(mode="after")
    def _check_type_is_given(self) -> Self:
        # The default type is none, so a forgotten type would silently drop the arguments
        given = [name for name in ("args", "interval", "monitor") if getattr(self, name)]
        if given and "type" not in self.model_fields_set:
            raise ValueError(
                f"type: required where lr_scheduler.{given[0]} is given:"
                " without it the learning rate stays constant"
            )
        return self


class TrainerConfig(Section):
    """Training, label noise and data subset, with ConvNorm's key names."""

    epochs: Positive = 200
    """Passes over the training set."""
    save_dir: FilePath = "saved/"
    """Folder that holds all run folders: <save_dir>/<name>/<run id>."""
    save_period: Positive = 1
    """Epochs from one model_epoch_N.pth to the next."""
    keep_checkpoints: Count = 2
    """How many of the newest model_epoch_N.pth to keep; 0 keeps all. model_best.pth and
    model_last.pth are always kept."""
    verbosity: Annotated[int, Field(ge=0, le=2)] = 2
    """0: warnings only; 1 and 2: one line per epoch."""
    label_dir: str | None = None
    """ConvNorm's key, accepted but not used: labels.npz is written to the run folder."""
    monitor: str = "max val_top1"
    """How the best model is chosen: 'min' or 'max' and a logged value, or 'off'."""
    early_stop: Annotated[Positive | None, A_MONITOR] = None
    """Stop training after this many epochs in a row without improvement; null: never."""
    tensorboard: bool = False
    """Write events for TensorBoard to the run folder."""
    percent: Fraction = 0.0
    """Rate of label noise: the fraction of labels that it replaces."""
    sym: Annotated[bool, A_RATE] = False
    """Symmetric label noise."""
    asym: Annotated[bool, A_RATE] = False
    """Asymmetric label noise between similar classes of CIFAR-10 and CIFAR-100."""
    noise_law: Annotated[Literal["inclusive", "exclusive"], SYMMETRIC_NOISE] = "inclusive"
    """Symmetric noise draws from all classes (inclusive, as published) or only from the wrong ones
    (exclusive)."""
    noise_file: InputPath | None = None
    """File of labels for the whole training set, such as CIFAR-N's: .npy, .npz, .pt, .json or .csv;
    see docs/data.md."""
    noise_key: str | None = None
    """Entry or column of a noise_file that holds several sets of labels."""
    noisy_validation: Annotated[bool, NOISE] = True
    """Validation labels carry the same noise; accuracy on the clean labels is always reported,
    too."""
    subset_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the whole training set to train on, the same for every class; at most the images
    that are not held out for validation."""
    OCNN: bool = False
    """Add OCNN's orthogonality penalty to the loss."""
    lamb_ocnn: Annotated[float, Field(ge=0), A_PENALTY] = 0.001
    """Weight of the OCNN penalty."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per update of an exponential moving average of the weights, which is evaluated and
    saved in addition to them; null: no average."""
    do_adv: bool = False
    """Adversarial training by train_robust.py: free, unless adversarial.method names another
    method."""
    fgsm_step: Annotated[Size, FREE_STEP] = 8
    """Step size of free adversarial training under linf, in 1/255 of the pixel range."""
    adv_clip_eps: Annotated[Size, NO_EPSILON] = 8
    """Radius under linf in training and attacks, in 1/255 of the pixel range, if
    adversarial.epsilon is not given."""
    adv_repeats: Annotated[Positive, FREE] = 4
    """Updates per minibatch in free adversarial training."""

    @field_validator("monitor")
    @classmethod
    def _check_monitor(cls, text: str, info: ValidationInfo) -> str:
        if text == "off" or not checks_names(info.context):
            return text
        mode, _, value = text.partition(" ")
        name = logged_value(value)
        if mode not in ("min", "max") or name is None:
            raise ValueError(
                f"{text!r} is neither 'off' nor 'min' or 'max' followed by a logged value:"
                f" {describe_logged_values()}"
            )
        return f"{mode} {name}"

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        chosen = [key for key in ("sym", "asym", "noise_file") if getattr(self, key)]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]}: only one kind of label noise at a time")
        if self.percent > 0 and not (self.sym or self.asym):
            raise ValueError(f"percent: {self.percent} has no effect: set sym or asym")
        if self.noise_key is not None and self.noise_file is None:
            raise ValueError("noise_key: has no effect without noise_file")
        return self
