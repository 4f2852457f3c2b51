"""Other forward methods for some layers of a model, for the time of an attack."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attacks.classifier import Model


@contextmanager
def replaced_forward(
    model: Model,
    is_replaced: Callable[[nn.Module], bool],
    make_forward: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Within the context, some layers of a model have another forward method.

    Left alone are layers that have one already, as in a context within another one; functions; and
    models with a part that is compiled or `nn.DataParallel`.

    Args:
        model: a module or a function.
        is_replaced: says whether a layer gets another forward method.
        make_forward: makes it. It should make an object, not a function, so that a copy of the
            model has one for its own layer.
    """
    layers: list[nn.Module] = []
    if isinstance(model, nn.Module) and not any(map(_keeps_its_forward, model.modules())):
        layers = [
            module
            for module in model.modules()
            if "forward" not in vars(module) and is_replaced(module)
        ]
    try:
        for layer in layers:
            # An attribute of the object is found before the method of its class
            layer.forward = make_forward(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _keeps_its_forward(module: nn.Module) -> bool:
    """Return whether a module must not get other forward methods inside."""
    # A compiled module would be compiled again, and the copies of DataParallel on other devices
    # would use the layers of the first
    return is_compiled(module) or isinstance(module, nn.DataParallel)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` was called on this module."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
