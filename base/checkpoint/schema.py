"""The schema of a checkpoint: the keys that evaluation reads, and those that a resume needs.

A file may come from anywhere, and its checksum only says that it is what somebody once wrote. So
the type of every key is checked, and that keys agree with each other, before anything is restored.
Whether weights, optimizer and schedule fit this run is checked where they are loaded.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)
from torch import Tensor

from base.config.section import Count, Number
from base.errors import CheckpointError
from base.text import one_line
from base.train_state import TrainState

MAX_DEPTH = 30
"""Levels of a config. Its own tree has five, and free-form arguments add a few."""

OLDEST_FIELDS = (
    "epochs_done",
    "batches_done",
    "learning_rate",
    "history",
    "best_value",
    "best_epoch",
    "epochs_without_improvement",
    "train_seconds",
    "images_seen",
)
"""Fields of `TrainState` that every checkpoint has. Newer fields take their defaults if they are
missing."""


def _plain_tensor(tensor: Tensor) -> Tensor:
    """Validate that a tensor is of a kind that runs save: dense, of real numbers, in memory."""
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized
    # Meta tensors stay on the meta device although torch.load maps all others to the CPU
    is_in_memory = tensor.device.type == "cpu"
    if not is_dense or not is_in_memory or tensor.is_complex():
        raise ValueError("expected a dense tensor of real numbers")
    return tensor


def _generator_state(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"expected a list of bytes, not {_type_and_shape(tensor)}")
    return tensor


def _one_number(tensor: Tensor) -> Tensor:
    if tensor.ndim != 0 or not tensor.is_floating_point():
        raise ValueError(f"expected one floating-point number, not {_type_and_shape(tensor)}")
    return tensor


def _json_tree(value: Any, level: int = 0) -> Any:
    """Validate that a JSON file could hold the value."""
    # A pickled list or dictionary may contain itself
    if level > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key of type {type(key).__name__}")
            _json_tree(below, level + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            _json_tree(below, level + 1)
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"a value of type {type(value).__name__}")
    return value


def _as_list(value: Any) -> Any:
    # A checkpoint may hold either, but strict validation does not take a tuple for a list
    if isinstance(value, tuple):
        return list(value)
    return value


JSONObject = Annotated[dict[str, Any], AfterValidator(_json_tree)]
PlainTensor = Annotated[Tensor, AfterValidator(_plain_tensor)]
Weights = dict[str, PlainTensor]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
PerChannel = Annotated[list[Finite], BeforeValidator(_as_list), Field(min_length=1)]
Names = Annotated[list[str], BeforeValidator(_as_list)]
GeneratorState = Annotated[PlainTensor, AfterValidator(_generator_state)]


class _Schema(BaseModel):
    """Strict types; unknown keys are ignored, as files of other code bases have their own."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class AnyCheckpoint(_Schema):
    """The keys that are read of any checkpoint, also to evaluate it. Each may be missing."""

    schema_version: Count = 0
    epoch: Count = 0
    batch: Count = 0
    ema_state_dict: dict[str, Any] = {}
    config: JSONObject = {}
    mean: PerChannel = []
    std: PerChannel = []
    class_names: Names = []


class OptimizerState(_Schema):
    """The state of an optimizer; `base.optim.state` checks it against the optimizer itself."""

    state: dict[int | str, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class MeterState(_Schema):
    """The state of `base.meters.Meters`."""

    sums: dict[str, Annotated[PlainTensor, AfterValidator(_one_number)]]
    count: Count


class Generators(_Schema):
    """The states of torch's generators, as `base.seeding.get_rng_state` returns them."""

    cpu: GeneratorState
    cuda: list[GeneratorState]


def _progress_schema() -> type[BaseModel]:
    """Make a schema of the fields of `TrainState`, with their types and ranges."""
    described = {}
    for field in fields(TrainState):
        is_required = field.name in OLDEST_FIELDS or field.default is MISSING
        described[field.name] = (field.type, ... if is_required else field.default)
    # Unlike in other sections, an unknown key is an error: the next save would lose it
    return create_model(
        "ProgressSchema", __config__=ConfigDict(strict=True, extra="forbid"), **described
    )


if TYPE_CHECKING:
    # type checkers do not know a class that a function makes
    ProgressSchema = BaseModel
else:
    ProgressSchema = _progress_schema()


class TrainingState(_Schema):
    """What a run resumes from: everything that `BaseTrainer.checkpoint` writes."""

    epoch: Count
    batch: Count
    state_dict: Weights
    ema_state_dict: Weights = {}
    ema_updates: Count = 0
    optimizer: OptimizerState
    optimizer_type: str
    scheduler: dict[str, Any]
    scheduler_type: str
    progress: ProgressSchema
    totals: MeterState
    method: dict[str, Any] = {}
    rng: Generators
    config: JSONObject
    mean: PerChannel
    std: PerChannel
    class_names: Names
    fingerprint: str
    image_fingerprints: dict[str, str] = {}
    arch: str = ""
    versions: dict[str, str] = {}
    monitor_best: Number | None = None


def check_readable(contents: Mapping[str, Any], file: Path) -> None:
    """Check the keys that every reader of a checkpoint relies on.

    Raises:
        CheckpointError: one of them is of another type, named by its dotted key.
    """
    _check(AnyCheckpoint, contents, file)


def without_unreadable(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of another code base's file without keys that mean something else there.

    A key means something else if its value has another type than here.
    """
    try:
        AnyCheckpoint.model_validate(dict(contents))
    except ValidationError as error:
        bad = {problem["loc"][0] for problem in error.errors()}
        return {key: value for key, value in contents.items() if key not in bad}
    return dict(contents)


def check_training_state(contents: Mapping[str, Any], file: Path) -> None:
    """Check that a checkpoint holds everything that a resume needs, and that its keys agree.

    Raises:
        CheckpointError: a key is missing, of another type, out of its range, or contradicts another
            key.
    """
    if "progress" not in contents:
        raise CheckpointError(
            f"{file}: holds no training state of this project: it can be evaluated, not resumed"
        )
    _check(TrainingState, contents, file)
    contradiction = _contradiction(contents)
    if contradiction:
        raise CheckpointError(f"{file}: is not a checkpoint: {contradiction}")


def _check(schema: type[BaseModel], contents: Mapping[str, Any], file: Path) -> None:
    try:
        schema.model_validate(dict(contents))
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: is not a checkpoint: {_describe(error.errors()[0])}"
        ) from None


def _describe(problem: Any) -> str:
    """Describe a problem that pydantic has found, with the dotted key where it is."""
    key = repr(".".join(map(str, problem["loc"])))[:200]
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    # pydantic also offers an instance of the schema's class, which no file can hold
    message = message.partition(" or instance of ")[0]
    value = problem["input"]
    if isinstance(value, bool | int | float | str) or value is None:
        return f"{key} is of type {type(value).__name__} ({one_line(repr(value), 80)}): {message}"
    return f"{key} is of type {type(value).__name__}: {message}"


def _contradiction(contents: Mapping[str, Any]) -> str | None:
    """Describe the first two values that cannot both be right; None if all agree."""
    progress = contents["progress"]
    totals = contents["totals"]
    done = progress["epochs_done"]
    batches = progress["batches_done"]
    history = progress["history"]
    if (contents["epoch"], contents["batch"]) != (done, batches):
        return (
            f"epoch {contents['epoch']} and batch {contents['batch']},"
            f" but 'progress' is {done} epochs and {batches} batches"
        )
    if [log.get("epoch") for log in history] != list(range(1, done + 1)):
        return f"'progress.history' does not log the epochs from 1 to {done}"
    best = progress["best_epoch"]
    if best is not None and best > done:
        return f"'progress.best_epoch' is {best}, but {done} epochs are done"
    has_trained = (done, batches) != (0, 0)
    if (progress["images_seen"] > 0) != has_trained:
        seen = progress["images_seen"]
        return f"'progress.images_seen' is {seen} after {done} epochs and {batches} batches"
    if done > 0 and progress["train_seconds"] == 0:
        return f"'progress.train_seconds' is 0 after {done} epochs"
    if batches > 0 and progress["learning_rate"] is None:
        return f"'progress.learning_rate' is None after {batches} batches of an epoch"
    # The meters are emptied after every epoch
    if (totals["count"] > 0) != (batches > 0) or bool(totals["sums"]) != (batches > 0):
        return f"'totals' are of {totals['count']} samples after {batches} batches of an epoch"
    if len(contents["mean"]) != len(contents["std"]):
        return f"'mean' has {len(contents['mean'])} channels, 'std' {len(contents['std'])}"
    return None


def _type_and_shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
