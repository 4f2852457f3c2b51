"""A network of the user's own, built by a function that the command line names.

    network = build_network("my_model.py:build", {"width": 16})
    network = build_network("torchvision.models:resnet18", {"num_classes": 10})

The code is run, because the user names it on the command line.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.classifier import checked_logits
from base.config.imports import import_own_code, requests_of
from base.config.surroundings import surroundings_kept
from base.device import kernels_explained
from base.distributed import is_primary
from base.distributed.session import is_connection_error
from base.errors import ConfigError, DataError, ProjectError
from base.registry import did_you_mean
from base.text import describe_error, one_line

logger = logging.getLogger(__name__)


class Normalized(nn.Module):
    """A network that gets `(images - mean) / std`, for one that does not normalize pixels itself.

    Args:
        network: maps normalized images to logits.
        mean: of each channel, in `[0, 1]`.
        std: of each channel, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(list(values), dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, classes)` of `images` `(B, C, H, W)` in `[0, 1]`."""
        return self.network((images - self.mean) / self.std)


def build_network(place: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network that a function or class builds.

    Args:
        place: `FILE.py:NAME` or `MODULE:NAME`. The file can import modules beside it. NAME may also
            be a network itself.
        arguments: keyword arguments of the function.

    Raises:
        ConfigError: one line that names `place` and says what is wrong with it.
    """
    flag = f"--model {one_line(place)}"
    source, _, name = place.rpartition(":")
    if not source or not name:
        raise ConfigError(
            f"{flag}: expected FILE.py:FUNCTION or MODULE:FUNCTION,"
            " such as my_model.py:build or torchvision.models:resnet18"
        )
    (code,) = import_own_code(requests_of([source], "--model", Path.cwd()))
    module = sys.modules[code.name]
    if not hasattr(module, name):
        hint = did_you_mean(name, vars(module))
        raise ConfigError(f"{flag}: {one_line(source)} has no {name}{hint}")
    build = getattr(module, name)
    if isinstance(build, nn.Module) and not arguments:
        return build
    if not callable(build) or isinstance(build, nn.Module):
        raise ConfigError(
            f"{flag}: {name} is a {type(build).__name__}; expected a function that returns a"
            " torch.nn.Module"
        )
    _check_arguments(build, arguments, f"{name} of {flag}")
    try:
        with surroundings_kept() as changed:
            network = build(**arguments)
    # SystemExit, too: the command would end as if it had done its work
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{flag}: {name}() failed: {describe_error(error)}") from error
    if changed and is_primary():
        logger.warning("%s: changed %s, which is restored", flag, ", ".join(changed))
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{flag}: {name}() returned a {type(network).__name__}; expected a torch.nn.Module"
        )
    return network


@contextmanager
def network_explained(place: str | None) -> Iterator[None]:
    """Report whatever code of the user's raises while a network is measured, in one line.

    Args:
        place: the value of `--model`. None is a network of this project: then only a layer or an
            attack of the user's can break its contract, by a `TypeError` or `ValueError`.

    Raises:
        ConfigError: naming `--model`, if there is one.
    """
    try:
        yield
    except ProjectError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, RuntimeError) and is_connection_error(error):
            raise
        if place is not None:
            what = describe_error(error)
            raise ConfigError(f"--model {one_line(place)}: {what} (--debug shows where)") from error
        if isinstance(error, TypeError | ValueError):
            raise ConfigError(str(error)) from error
        raise


def _check_arguments(build: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> None:
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):
        # A function written in C may have no signature. Calling it will report the error.
        return
    # A TypeError from inside the function would look the same as one for a wrong argument.
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = one_line(signature, 200)
        raise ConfigError(f"--model_args: {error}; {what} takes {takes}") from None


def count_logits(network: nn.Module, image_shape: Sequence[int], device: torch.device) -> int:
    """Return the number of logits that a network in evaluation mode gives for one image.

    `image_shape` is `(C, H, W)`.

    Raises:
        DataError: it cannot take such an image.
        TypeError, ValueError: it does not return logits of at least two classes.
    """
    image = torch.zeros(1, *image_shape, device=device, dtype=torch.float32)
    channels, height, width = image_shape
    kind = type(network).__name__

    def answer(images: Tensor) -> Any:
        try:
            with kernels_explained(image.device):
                return network(images)
        except ProjectError:
            raise
        except Exception as error:
            raise DataError(
                f"images of {width}x{height} pixels with {channels} channels, which {kind} cannot"
                f" take: {describe_error(error)}"
            ) from error

    with torch.no_grad():
        return checked_logits(answer, image).shape[1]
