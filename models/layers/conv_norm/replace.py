"""Turns any network's convolutions into ConvNorm."""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeGuard

from torch import Tensor, fx, nn

from .layer import ConvNorm2d

SHOWN = 3
"""Convolutions that a warning names."""


def replace_with_conv_norm(module: nn.Module) -> nn.Module:
    """Swap every plain `nn.Conv2d` of a network, with the batch norm behind it, for a `ConvNorm2d`,
    in place.

    The batch norm behind a convolution is the plain `nn.BatchNorm2d` that takes its output, and
    that nothing else takes, in every place where either is used; in which order they are registered
    does not matter. It moves, with everything it learned, into the new layer, and an `nn.Identity`
    takes its place. A convolution without one gets a `ConvNorm2d` with `bn=False`. The
    convolution's own parameters move too (they stay the same objects), and so do device, dtype and
    train or eval mode. `bpconv` is new and random.

    The flow of data is read off a symbolic trace of `forward` (`torch.fx`), in training and in eval
    mode, which needs no input. Where a module's forward cannot be traced, its submodules are traced
    on their own. A convolution that no trace meets is paired with the batch norm registered next to
    it, and a warning names it. One whose weight is taken, `F.conv2d(x, conv.weight)`, and that is
    never called stays as it is, with a warning too.

    Subclasses of `nn.Conv2d` (`ConvNorm2d` and its inside, the spectral and orthogonal
    convolutions) and convolutions whose weight is computed by a hook stay as they are, so a second
    call changes nothing.

    Args:
        module: any network, torchvision's included, or a single convolution.

    Returns:
        `module` itself; the new layer where `module` is a convolution.
    """
    if isinstance(module, nn.Conv2d):
        return _conv_norm_from(module, None) if _is_plain_conv(module) else module
    flow = _Flow()
    _follow(module, flow, is_whole=True, seen=set())
    pairs = {conv: flow.batch_norm_behind(conv) for conv in flow.takers if conv not in flow.left}
    uncalled = flow.parted - flow.takers.keys()
    guessed = {
        conv: norm
        for conv, norm in _neighbors(module).items()
        if conv not in pairs and conv not in uncalled
    }
    for conv, norm in guessed.items():
        is_free = norm is not None and norm not in flow.givers and norm not in pairs.values()
        pairs[conv] = norm if is_free else None
    _warn_of(guessed, module, flow)
    if uncalled:
        names = [name for name, part in module.named_modules() if part in uncalled]
        warnings.warn(
            f"replace_with_conv_norm leaves {_shown(names)} as it is: {type(module).__name__} takes"
            " its weight and never calls it",
            stacklevel=2,
        )
    replaced: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs.items():
        replaced[conv] = _conv_norm_from(conv, norm)
        if norm is not None:
            replaced[norm] = nn.Identity().train(norm.training)
    for parent in list(_parents(module)):
        for name, child in parent._modules.items():
            # a layer that is used in two places stays one layer
            parent._modules[name] = replaced.get(child, child)
    return module


@dataclass
class _Flow:
    """Which layer takes whose output, as far as traces tell.

    Attributes:
        takers: plain convolution -> the batch norms that alone take its output, over all calls;
            None among them where something else takes it.
        givers: plain batch norm -> the layers whose output it takes; None among them where that is
            no layer's.
        left: plain convolutions whose output leaves the part of the network that could be traced.
        parted: plain convolutions whose weight or bias is taken out of them.
    """

    takers: dict[nn.Conv2d, set[nn.BatchNorm2d | None]] = field(default_factory=dict)
    givers: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    left: set[nn.Conv2d] = field(default_factory=set)
    parted: set[nn.Conv2d] = field(default_factory=set)

    def read(self, graph: fx.Graph, root: nn.Module, is_whole: bool) -> None:
        """Add what the trace of `root` tells."""
        for node in graph.nodes:
            if node.op == "get_attr":
                owner = root.get_submodule(str(node.target).rpartition(".")[0])
                if _is_plain_conv(owner):
                    self.parted.add(owner)
            layer = _layer(node, root)
            if layer is not None and _is_plain_conv(layer):
                users = [user for user in node.users if not _asks_for_shape(user)]
                taker = _layer(users[0], root) if len(users) == 1 else None
                known = taker if _is_batch_norm(taker, layer.out_channels) else None
                self.takers.setdefault(layer, set()).add(known)
                if not is_whole and any(user.op == "output" for user in users):
                    self.left.add(layer)
            elif layer is not None and type(layer) is nn.BatchNorm2d:
                self.givers.setdefault(layer, set()).add(_layer(node.all_input_nodes[0], root))

    def batch_norm_behind(self, conv: nn.Conv2d) -> nn.BatchNorm2d | None:
        """The batch norm that takes the convolution's output and nothing else's in every call; None
        where there is none."""
        for norm in self.takers[conv]:
            if norm is not None and self.takers[conv] == {norm} and self.givers[norm] == {conv}:
                return norm
        return None


class _Tracer(fx.Tracer):
    """Looks into everything that holds a convolution, torch's own wrappers included, but into no
    convolution."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d):
            return True
        holds_conv = any(isinstance(child, nn.Conv2d) for child in m.modules())
        return not holds_conv and super().is_leaf_module(m, module_qualified_name)


def _follow(module: nn.Module, flow: _Flow, *, is_whole: bool, seen: set[nn.Module]) -> None:
    """Trace a module, or where that cannot be done its submodules."""
    if module in seen or isinstance(module, nn.Conv2d):
        return
    seen.add(module)
    graphs = [
        graph for training in (True, False) if (graph := _trace(module, training)) is not None
    ]
    for graph in graphs:
        flow.read(graph, module, is_whole)
    if not graphs:
        for child in module.children():
            _follow(child, flow, is_whole=False, seen=seen)


def _trace(module: nn.Module, training: bool) -> fx.Graph | None:
    """The calls of a module's forward in one of the modes; None where it cannot be traced. The
    module is left alone: a copy is traced, whose parameters are the module's own, and whose buffers
    and attributes the forward may change."""
    shared: dict[int, Tensor] = {id(value): value for value in module.parameters()}
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, Tensor) and not value.is_leaf:
            # an old weight hook's result: a tensor with a history cannot be copied
            shared[id(value)] = value
    try:
        options = inspect.signature(module.forward).parameters.values()
        fixed = {
            option.name: option.default for option in options if option.default is not option.empty
        }
        with warnings.catch_warnings(action="ignore"):
            return _Tracer().trace(deepcopy(module, shared).train(training), fixed)
    except Exception:  # whatever a forward does with something that is no tensor
        return None


def _layer(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _asks_for_shape(node: fx.Node) -> bool:
    """Whether a call looks at a tensor's shape or type only, which a batch norm does not change."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")


def _parents(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, but for convolutions and what they are made of."""
    if not isinstance(module, nn.Conv2d):
        yield module
        for child in module.children():
            yield from _parents(child)


def _neighbors(module: nn.Module) -> dict[nn.Conv2d, nn.BatchNorm2d | None]:
    """Plain convolution -> the plain batch norm of its width that is registered next to it, where
    there is one."""
    found: dict[nn.Conv2d, nn.BatchNorm2d | None] = {}
    for parent in _parents(module):
        # with repetitions, which named_children() leaves out
        children = [child for child in parent._modules.values() if child is not None]
        for child, following in pairwise([*children, None]):
            if _is_plain_conv(child):
                norm = following if _is_batch_norm(following, child.out_channels) else None
                found.setdefault(child, norm)
    return found


def _warn_of(guessed: Iterable[nn.Conv2d], module: nn.Module, flow: _Flow) -> None:
    """Name the convolutions whose batch norm is a guess: no trace meets them, and a batch norm of
    their width is free."""
    free = {
        part.num_features
        for part in module.modules()
        if type(part) is nn.BatchNorm2d and part not in flow.givers
    }
    names = {part: name for name, part in module.named_modules()}
    doubtful = [names[conv] for conv in guessed if conv.out_channels in free]
    if doubtful:
        warnings.warn(
            f"replace_with_conv_norm cannot follow the data through {type(module).__name__} to the"
            f" batch norms behind {_shown(doubtful)}: each is paired with the one registered next to it, or"
            " with none; look whether that is right",
            stacklevel=3,
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_plain_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
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
    layer.weight, layer.bias = conv.weight, conv.bias
    if batch_norm is not None:
        layer.bn = True
        layer.batch_norm = batch_norm
    return layer
