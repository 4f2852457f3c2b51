"""Replaces the convolutions of any network with ConvNorm."""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeGuard

from torch import Tensor, fx, nn

from .layer import ConvNorm2d

NAMES_IN_WARNING = 3


def replace_with_conv_norm(module: nn.Module) -> nn.Module:
    """Replace every plain `nn.Conv2d` of a network and the batch norm behind it with a
    `ConvNorm2d`, in place.

    A plain `nn.BatchNorm2d` is behind a convolution if, in every call of either, it alone takes the
    convolution's output and takes nothing else. The order in which they are registered does not
    matter. The batch norm moves, with everything it learned, into the new layer, and an
    `nn.Identity` takes its place. A convolution without one becomes a `ConvNorm2d` with `bn=False`.
    The convolution's own parameters move, too (they stay the same objects), and the new layer has
    its device, dtype and mode (training or eval). `bpconv` is new and random.

    The flow of data is read from symbolic traces of `forward` (`torch.fx`) in training and in eval
    mode, which need no input. Where a module's forward cannot be traced, its submodules are traced
    one by one. A convolution that no trace reaches is paired with the batch norm registered next to
    it, and a warning names it if that may be wrong. A convolution that is never called, because the
    network takes its weight (`F.conv2d(x, conv.weight)`), is not replaced, and a warning names it.

    Subclasses of `nn.Conv2d` (`ConvNorm2d` and its parts, the spectral and orthogonal convolutions)
    and convolutions whose weight is computed by a hook are not replaced, so a second call changes
    nothing.

    Args:
        module: any network, torchvision's included, or a single convolution.

    Returns:
        `module` itself; the new layer where `module` is a convolution.
    """
    if isinstance(module, nn.Conv2d):
        return _conv_norm_from(module, None) if _is_plain_conv(module) else module
    flow = _DataFlow()
    _trace_into(module, flow, is_whole=True, visited=set())

    # What the traces show is certain.
    pairs = {
        conv: flow.batch_norm_behind(conv)
        for conv in flow.consumers
        if conv not in flow.leaves_trace
    }

    # What they do not reach is guessed from the order of registration.
    uncalled = flow.weight_taken - flow.consumers.keys()
    guessed = {
        conv: norm
        for conv, norm in _registered_neighbors(module).items()
        if conv not in pairs and conv not in uncalled
    }
    for conv, norm in guessed.items():
        is_free = norm is not None and norm not in flow.producers and norm not in pairs.values()
        pairs[conv] = norm if is_free else None
    _warn_about_guesses(guessed, module, flow)
    if uncalled:
        names = [name for name, part in module.named_modules() if part in uncalled]
        warnings.warn(
            f"replace_with_conv_norm does not replace {_format_names(names)}:"
            f" {type(module).__name__} reads the weight without calling the layer",
            stacklevel=2,
        )
    _swap_modules(module, pairs)
    return module


def _swap_modules(module: nn.Module, pairs: dict[nn.Conv2d, nn.BatchNorm2d | None]) -> None:
    replaced: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs.items():
        replaced[conv] = _conv_norm_from(conv, norm)
        if norm is not None:
            replaced[norm] = nn.Identity().train(norm.training)
    # The walk ends before anything changes: it must not enter the new layers.
    for parent in list(_parents(module)):
        # `_modules`, because `named_children()` leaves out a layer's second place.
        for name, child in parent._modules.items():
            parent._modules[name] = replaced.get(child, child)


@dataclass
class _DataFlow:
    """Which layer takes the output of which other layer, as far as traces show it.

    Attributes:
        consumers: plain convolution -> the batch norms that alone take its output, over all calls;
            None stands for anything else that takes it.
        producers: plain batch norm -> the layers whose output it takes; None stands for anything
            that is not a layer.
        leaves_trace: plain convolutions whose output leaves the part of the network that could be
            traced.
        weight_taken: plain convolutions whose weight or bias is read by another module's forward.
    """

    consumers: dict[nn.Conv2d, set[nn.BatchNorm2d | None]] = field(default_factory=dict)
    producers: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    leaves_trace: set[nn.Conv2d] = field(default_factory=set)
    weight_taken: set[nn.Conv2d] = field(default_factory=set)

    def add(self, graph: fx.Graph, root: nn.Module, is_whole: bool) -> None:
        """Add what the trace of `root` shows."""
        for node in graph.nodes:
            if node.op == "get_attr":
                owner = root.get_submodule(str(node.target).rpartition(".")[0])
                if _is_plain_conv(owner):
                    self.weight_taken.add(owner)
            layer = _layer(node, root)
            if layer is not None and _is_plain_conv(layer):
                users = [user for user in node.users if not _reads_only_shape(user)]
                consumer = _layer(users[0], root) if len(users) == 1 else None
                norm = consumer if _is_batch_norm(consumer, layer.out_channels) else None
                self.consumers.setdefault(layer, set()).add(norm)
                if not is_whole and any(user.op == "output" for user in users):
                    self.leaves_trace.add(layer)
            elif layer is not None and type(layer) is nn.BatchNorm2d:
                producer = _layer(node.all_input_nodes[0], root)
                self.producers.setdefault(layer, set()).add(producer)

    def batch_norm_behind(self, conv: nn.Conv2d) -> nn.BatchNorm2d | None:
        """The batch norm that takes the convolution's output and nothing else's in every call; None
        if there is not exactly one.
        """
        norms = self.consumers[conv]
        for norm in norms:
            if norm is not None and norms == {norm} and self.producers[norm] == {conv}:
                return norm
        return None


class _Tracer(fx.Tracer):
    """Traces into every module that holds a convolution, torch's own wrappers included, but not
    into convolutions.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d):
            return True
        holds_conv = any(isinstance(child, nn.Conv2d) for child in m.modules())
        return not holds_conv and super().is_leaf_module(m, module_qualified_name)


def _trace_into(
    module: nn.Module, flow: _DataFlow, *, is_whole: bool, visited: set[nn.Module]
) -> None:
    """Trace a module, or its submodules where that fails."""
    if module in visited or isinstance(module, nn.Conv2d):
        return
    visited.add(module)
    # A forward may take another path in each mode.
    graphs = [_trace(module, training) for training in (True, False)]
    traced = [graph for graph in graphs if graph is not None]
    for graph in traced:
        flow.add(graph, module, is_whole)
    if not traced:
        for child in module.children():
            _trace_into(child, flow, is_whole=False, visited=visited)


def _trace(module: nn.Module, training: bool) -> fx.Graph | None:
    """The calls of a module's forward in one of the modes; None if it cannot be traced."""
    # A copy is traced, because a forward may change buffers and attributes. The copy shares the
    # module's parameters, to save memory.
    shared: dict[int, Tensor] = {id(value): value for value in module.parameters()}
    for part in module.modules():
        for value in vars(part).values():
            # An old weight hook leaves its result here. A tensor with a history cannot be copied.
            if isinstance(value, Tensor) and not value.is_leaf:
                shared[id(value)] = value
    try:
        options = inspect.signature(module.forward).parameters.values()
        defaults = {
            option.name: option.default for option in options if option.default is not option.empty
        }
        with warnings.catch_warnings(action="ignore"):
            return _Tracer().trace(deepcopy(module, shared).train(training), defaults)
    except Exception:
        # A forward that expects a tensor and gets a symbol may raise anything.
        return None


def _layer(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _reads_only_shape(node: fx.Node) -> bool:
    """Whether a call reads only a tensor's shape or dtype, which a batch norm does not change."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")


def _parents(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all its submodules, except for convolutions and their parts."""
    if not isinstance(module, nn.Conv2d):
        yield module
        for child in module.children():
            yield from _parents(child)


def _registered_neighbors(module: nn.Module) -> dict[nn.Conv2d, nn.BatchNorm2d | None]:
    """Plain convolution -> the plain batch norm of its width that is registered next to it, or
    None.
    """
    found: dict[nn.Conv2d, nn.BatchNorm2d | None] = {}
    for parent in _parents(module):
        children = [child for child in parent._modules.values() if child is not None]
        for child, following in pairwise([*children, None]):
            if _is_plain_conv(child):
                norm = following if _is_batch_norm(following, child.out_channels) else None
                found.setdefault(child, norm)
    return found


def _warn_about_guesses(guessed: Iterable[nn.Conv2d], module: nn.Module, flow: _DataFlow) -> None:
    """Name the convolutions whose batch norm may be the wrong one."""
    # Where no batch norm of the right width is free, the guess "none" is certain.
    free_widths = {
        part.num_features
        for part in module.modules()
        if type(part) is nn.BatchNorm2d and part not in flow.producers
    }
    names = {part: name for name, part in module.named_modules()}
    doubtful = [names[conv] for conv in guessed if conv.out_channels in free_widths]
    if doubtful:
        warnings.warn(
            f"replace_with_conv_norm cannot follow the data through {type(module).__name__} to the"
            f" batch norms behind {_format_names(doubtful)}: each is paired with the one registered"
            " next to it, or with none; check whether that is right",
            stacklevel=3,
        )


def _format_names(names: list[str]) -> str:
    text = ", ".join(names[:NAMES_IN_WARNING])
    if len(names) > NAMES_IN_WARNING:
        text += f" and {len(names) - NAMES_IN_WARNING} more"
    return text


def _is_plain_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    # A weight that a hook computes is not among the parameters.
    return type(module) is nn.Conv2d and "weight" in module._parameters


def _is_batch_norm(module: nn.Module | None, channels: int) -> TypeGuard[nn.BatchNorm2d]:
    return type(module) is nn.BatchNorm2d and module.num_features == channels


def _conv_norm_from(conv: nn.Conv2d, batch_norm: nn.BatchNorm2d | None) -> ConvNorm2d:
    layer = ConvNorm2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        bn=False,
    )
    layer.to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)
    # The same objects, so that an optimizer that was built before keeps updating them.
    layer.weight = conv.weight
    layer.bias = conv.bias
    if batch_norm is not None:
        layer.bn = True
        layer.batch_norm = batch_norm
    return layer
