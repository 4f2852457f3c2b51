"""The config's sections on training: optimiser, schedule, and everything about the loop."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from base.config_names import LOGGED_VALUES, logged_value
from base.config_section import Count, FilePath, Fraction, InputPath, Positive, Section


class OptimizerConfig(Section):
    """The optimiser; without this section SGD with lr 0.1, momentum 0.9 and weight decay 5e-4."""

    type: str = "SGD"
    """Name of a class of torch.optim."""
    args: dict[str, Any] = Field(default={})
    """Its arguments, checked against its signature; what is left out has torch's default."""


class SchedulerConfig(Section):
    """The learning-rate schedule."""

    type: str = "none"
    """Name of a class of torch.optim.lr_scheduler, or none."""
    args: dict[str, Any] = Field(default={})
    """Its arguments. T_max of CosineAnnealingLR and total_steps of OneCycleLR default to the whole run."""
    interval: Literal["epoch", "batch"] | None = None
    """When it steps; null: after every batch for OneCycleLR and CyclicLR, after every epoch for the others."""
    monitor: str | None = None
    """ReduceLROnPlateau: the value it watches; null: val_loss, or loss without a validation set."""

    @field_validator("monitor")
    @classmethod
    def _monitor_is_known(cls, name: str | None) -> str | None:
        known = name if name is None else logged_value(name)
        if name is not None and known is None:
            raise ValueError(f"{name!r} is not a logged value: {LOGGED_VALUES}")
        return known

    @model_validator(mode="after")
    def _has_type(self) -> Self:
        given = [name for name in ("args", "interval", "monitor") if getattr(self, name)]
        if given and "type" not in self.model_fields_set:
            raise ValueError(f"type: required where lr_scheduler.{given[0]} is given: without it there is no schedule")
        return self


class TrainerConfig(Section):
    """Training, label noise and data subset, under ConvNorm's names."""

    epochs: Positive = 200
    """Passes over the training set."""
    save_dir: FilePath = "saved/"
    """Folder of all run folders: <save_dir>/<name>/<run id>."""
    save_period: Positive = 1
    """Every so many epochs model_epoch_N.pth is written."""
    keep_checkpoints: Count = 2
    """How many of the newest model_epoch_N.pth are kept; 0 keeps all. model_best.pth and model_last.pth are always kept."""
    verbosity: Annotated[int, Field(ge=0, le=2)] = 2
    """0 warnings only, 1 and 2 a line per epoch."""
    label_dir: str | None = None
    """ConvNorm's key, accepted and not used: labels.npz lies in the run folder."""
    monitor: str = "max val_top1"
    """What the best model is: 'min' or 'max' and a logged value, or 'off'."""
    early_stop: Positive | None = None
    """Epochs in a row without improvement after which training stops; null never."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder."""
    percent: Fraction = 0.0
    """Rate of label noise."""
    sym: bool = False
    """Symmetric label noise."""
    asym: bool = False
    """Asymmetric label noise: similar classes of CIFAR-10 and CIFAR-100."""
    noise_law: Literal["inclusive", "exclusive"] = "inclusive"
    """Symmetric noise draws from all classes (inclusive, as published) or from the wrong ones only (exclusive)."""
    noise_file: InputPath | None = None
    """Labels for the whole training set, such as CIFAR-N's: .npy, .npz, .pt, .json or .csv; see
    docs/data.md."""
    noise_key: str | None = None
    """Which entry, or column, of a noise_file that holds several label sets."""
    noisy_validation: bool = True
    """Validation labels carry the same noise; accuracy on the clean ones is always reported beside."""
    subset_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the whole training set that is trained on, the same for every class; at most what validation leaves."""
    OCNN: bool = False
    """Add OCNN's orthogonality penalty to the loss."""
    lamb_ocnn: Annotated[float, Field(ge=0)] = 0.001
    """Weight of OCNN's penalty."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per update of a moving average of the weights, which is evaluated and saved beside them; null: no average."""
    do_adv: bool = False
    """Adversarial training by train_robust.py: free, unless adversarial.method says otherwise."""
    fgsm_step: Annotated[float, Field(ge=0, le=255)] = 8
    """Free adversarial training under linf: step in 1/255 of the pixel range."""
    adv_clip_eps: Annotated[float, Field(ge=0, le=255)] = 8
    """The l-inf bound of training and of attacks, in 1/255 of the pixel range, where adversarial.epsilon gives none."""
    adv_repeats: Positive = 4
    """Free adversarial training: updates per minibatch."""

    @field_validator("monitor")
    @classmethod
    def _monitor_is_known(cls, text: str) -> str:
        if text == "off":
            return text
        mode, _, value = text.partition(" ")
        name = logged_value(value)
        if mode not in ("min", "max") or name is None:
            raise ValueError(f"{text!r} is neither 'off' nor 'min' or 'max' followed by a logged value: {LOGGED_VALUES}")
        return f"{mode} {name}"

    @model_validator(mode="after")
    def _one_noise(self) -> Self:
        chosen = [key for key in ("sym", "asym", "noise_file") if getattr(self, key)]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]}: only one kind of label noise at a time")
        if self.percent > 0 and not (self.sym or self.asym):
            raise ValueError(f"percent: {self.percent} has no effect: set sym or asym")
        if self.noise_key is not None and self.noise_file is None:
            raise ValueError("noise_key: has no effect without noise_file")
        return self
