"""Models with frozen weights, for attacks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from attacks.batch_norm import cheap_batch_norm
from attacks.cast_once import cast_once
from attacks.classifier import Model


@contextmanager
def frozen(model: Model, training: bool | None = None) -> Iterator[None]:
    """Within the context, no parameter of the model requires gradients.

    Afterwards every module and parameter has its own flags again. A function has none. If a layer
    has a context manager `fixed_weights`, it is entered, too: ConvNorm then computes V only once.

    Args:
        model: a module or a function.
        training: put all modules into training mode (True) or evaluation mode (False) within the
            context; None leaves their modes alone.

    Raises:
        ValueError: the weights were made in `torch.inference_mode()`.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    # A module that was frozen by torch.jit has no modes
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.is_inference() for parameter in trained):
        raise ValueError(
            "model: its weights were made in torch.inference_mode(), and no gradient can pass them;"
            " build or load it outside of that mode"
        )
    try:
        if training is not None:
            _set_training(model, training)
        for parameter in trained:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            for module in model.modules():
                if hasattr(type(module), "fixed_weights"):
                    stack.enter_context(module.fixed_weights())
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        # Not model.train(mode): modules may have been in different modes
        for module, mode in modes:
            module.training = mode


def _set_training(model: nn.Module, training: bool) -> None:
    try:
        # A network's own method may leave some layers in another mode
        model.train(training)
    except NotImplementedError:
        # A module of torch.export raises it, perhaps before the modules after it had their turn
        for module in model.modules():
            module.training = training


@contextmanager
def under_attack(model: Model, training: bool | None = None) -> Iterator[None]:
    """Within the context the model is `frozen`, and its passes do less work for weights that stay
    as they are; see `cast_once` and `cheap_batch_norm`.

    Args:
        model, training: as in `frozen`.
    """
    with frozen(model, training), cast_once(model), cheap_batch_norm(model):
        yield
