"""From a model to a graph in which the weights to normalise stand as ``get_attr`` nodes.

Three steps, used by `specnorm_fx.passes`: `share` copies the structure, `symbolic_trace` or
`export_trace` makes the graph, and `inline` opens the leaf modules whose weights are selected.
`find_weights` lists what can be selected.
"""

import contextlib
import copy
import inspect
import itertools
import keyword
import linecache
import logging
import operator
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from specnorm_fx.exported import layer_of, tidy_
from specnorm_fx.graph_module import attribute, owner_of, parameter_names, spectral_norm_node

__all__ = [
    "CONVOLUTIONS",
    "DEFAULT_KINDS",
    "KINDS",
    "TRANSPOSED",
    "Weight",
    "computed_weights",
    "export_trace",
    "find_weights",
    "inline",
    "is_alias",
    "obstacle",
    "refuse_opaque_users",
    "share",
    "symbolic_trace",
]

logger = logging.getLogger(__name__)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# The layers whose ``weight`` is normalised when nothing is selected, and those whose can be.
DEFAULT_KINDS = (nn.Linear, *CONVOLUTIONS)
KINDS = (*DEFAULT_KINDS, nn.Embedding)

_ATEN = torch.ops.aten

# The functions that use a parameter as such a weight; it is their second argument, but for the last.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
    F.embedding: nn.Embedding,
    # What torch.export leaves of them.
    _ATEN.linear.default: nn.Linear,
    _ATEN.conv1d.default: nn.Conv1d,
    _ATEN.conv1d.padding: nn.Conv1d,
    _ATEN.conv2d.default: nn.Conv2d,
    _ATEN.conv2d.padding: nn.Conv2d,
    _ATEN.conv3d.default: nn.Conv3d,
    _ATEN.conv3d.padding: nn.Conv3d,
    _ATEN.conv_transpose1d.default: nn.ConvTranspose1d,
    _ATEN.conv_transpose2d.input: nn.ConvTranspose2d,
    _ATEN.conv_transpose3d.input: nn.ConvTranspose3d,
    _ATEN.embedding.default: nn.Embedding,
}

# What run_decompositions() leaves of them: every convolution, with a flag for the transposed ones, ...
_CONVOLUTION = (_ATEN.convolution.default, _ATEN._convolution.default)
_TRANSPOSED_FLAG = 6
# ... and a Linear as the product with its transposed weight, at this position.
_PRODUCTS = {_ATEN.mm.default: 1, _ATEN.bmm.default: 1, _ATEN.addmm.default: 2}
_TRANSPOSITIONS = (_ATEN.t.default, _ATEN.permute.default, _ATEN.transpose.int)
_EXPANSIONS = (_ATEN.expand.default, _ATEN.view.default)


@dataclass
class Weight:
    """A weight that may be normalised.

    Attributes:
        names: All FQNs of the parameter, the first in module order first.
        modules: FQNs of the modules that own it, in the same order.
        module: The first of those modules.
        kind: The layer type that says how the weight is used.
        parameter: The parameter.
        nodes: Its nodes in the graph: ``get_attr`` of it, ``call_module`` of a layer that owns it.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    module: nn.Module
    kind: type[nn.Module]
    parameter: Tensor
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def fqn(self) -> str:
        """The first name."""
        return self.names[0]


def share(model: nn.Module) -> nn.Module:
    """A copy of the module structure that shares every parameter and buffer with the original.

    What happens to the copy (tracing, flags, new buffers, edits of the graph) leaves the original as
    it is.

    Args:
        model: Any module.

    Raises:
        TypeError: Something the model holds cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (module._parameters, module._buffers, vars(module))
        for value in itertools.chain.from_iterable(d.values() for d in held):
            if isinstance(value, Tensor):
                memo[id(value)] = value
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own pytree specs, in an exported graph, by what it has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({error}), and transform works on a copy that "
            f"shares the parameters. Keep what cannot be copied out of the module, or give the class a "
            f"__deepcopy__."
        ) from error


_one_at_a_time = threading.RLock()

# What no gradient flows through, by the name of the function or method.
_WITHOUT_GRADIENT = {"gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "detach", "size", "dim"}


class Tracer(fx.Tracer):
    """fx.Tracer that also records reads of buffers, instead of baking in what they hold today.

    An operation inside ``torch.no_grad``, ``torch.inference_mode`` or ``torch.autocast`` is an error where
    that makes a difference: fx records nothing of such regions.
    """

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As fx does."""
        self._precisions = 0  # regions of autocast around what runs
        self._without_gradient: set[fx.Node] = set()
        tensors = itertools.chain(root.parameters(), root.buffers()) if isinstance(root, nn.Module) else ()
        with self._counted_precisions(), _NothingFixed(tensors):
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that does not lose an assignment."""
        return _Proxy(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """As fx does, for an operation outside of such regions."""
        proxy = super().create_proxy(*args, **kwargs)
        node = proxy.node
        target = str(getattr(node.target, "__name__", node.target)).strip("_")
        if node.op == "get_attr":
            is_free = not self._is_parameter(str(node.target))
        else:
            of_free = all(x in self._without_gradient for x in node.all_input_nodes)
            is_free = node.op in ("call_function", "call_method") and (of_free or target in _WITHOUT_GRADIENT)
        if is_free:
            self._without_gradient.add(node)
        elif not torch.is_grad_enabled():
            raise TraceError("a graph does not keep what is inside torch.no_grad or torch.inference_mode")
        if self._precisions and node.op != "get_attr":
            raise TraceError("a graph does not keep what is inside torch.autocast")
        return proxy

    def _is_parameter(self, fqn: str) -> bool:
        # Not by `attribute`: while a trace is on, to read one makes a proxy.
        *path, name = fqn.split(".")
        owner: Any = self.root
        for part in path:
            owner = owner._modules[part]
        return name in owner._parameters

    @contextlib.contextmanager
    def _counted_precisions(self) -> Iterator[None]:
        with _one_at_a_time:  # or the first to end would put back what the second has found
            here, region = threading.get_ident(), torch.autocast
            enter: Any = region.__enter__
            leave: Any = region.__exit__

            def counted_enter(entered: Any) -> Any:
                self._precisions += threading.get_ident() == here
                return enter(entered)

            def counted_exit(entered: Any, *exception: Any) -> Any:
                self._precisions -= threading.get_ident() == here
                return leave(entered, *exception)

            with patch.multiple(region, __enter__=counted_enter, __exit__=counted_exit):
                yield

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn layers, as in fx; a user's module stays transparent when it is parametrised."""
        if nn.utils.parametrize.is_parametrized(m):
            return nn.utils.parametrize.type_before_parametrizations(m).__module__.startswith("torch.nn")
        return super().is_leaf_module(m, module_qualified_name)


class _Proxy(fx.Proxy):
    """fx.Proxy would take what is assigned to ``data`` of a tensor, say, and the graph do without."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):
            raise TraceError(_ASSIGNED.format(name))
        super().__setattr__(name, value)


_ASSIGNED = (
    "a graph does not keep what is assigned to .{} of a tensor. Change a buffer in place, "
    "buffer.copy_(...), or compute a new tensor, weight * mask"
)


class _NothingFixed(TorchFunctionMode):
    """What runs while a trace does, and is not recorded, would be the same in every forward.

    Random numbers that are drawn, and what is computed from parameters and buffers that the forward has taken
    past the attributes of its modules (``self.parameters()``), which alone give proxies.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in tensors}

    def __enter__(self) -> Any:
        self._others = _other_generators()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = (kwargs or {}).get("generator")
        before = _generators(own)
        is_of_own = any(id(x) in self._own for x in tree_leaves((args, kwargs)))
        if is_of_own and _is_of_values(func, types):
            raise TraceError(_COMPUTED)
        result = func(*args, **(kwargs or {}))
        if is_of_own and any(isinstance(x, Tensor) for x in tree_leaves(result)):
            raise TraceError(_COMPUTED)
        if not all(map(torch.equal, before, _generators(own))):
            raise TraceError("a trace would fix the random numbers that are drawn here")
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if exception[0] is None and _other_generators() != self._others:
            raise TraceError("a trace would fix what the forward draws from Python's or NumPy's random")


_COMPUTED = (
    "a trace would fix what is computed here from a parameter or buffer. It follows those that are read as "
    "attributes (self.layer.weight), not self.parameters(), self._parameters[...] or a list of tensors"
)


# Functions whose result is no tensor, but comes from the elements of one; or that write to it, as also those
# whose name ends in "_" and the operators like "+=".
_OF_VALUES = {"__setitem__", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__"}


def _is_of_values(func: Any, types: Any) -> bool:
    """Whether a function reads or writes elements without giving a tensor, and is run, not recorded."""
    name = getattr(func, "__name__", "")
    writes = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    return (name in _OF_VALUES or writes) and not any(issubclass(kind, fx.Proxy) for kind in types)


def _generators(own: torch.Generator | None) -> list[Tensor]:
    """The states of torch's, and of the model's own."""
    on_cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_cuda, *([] if own is None else [own.get_state()])]


def _other_generators() -> list[Any]:
    """The states of Python's, and of NumPy's where it is there."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    _, keys, *position = numpy.random.get_state()
    return [random.getstate(), keys.tobytes(), position]


@contextlib.contextmanager
def _plain_checkpoints(model: nn.Module) -> Iterator[None]:
    """What the forward checkpoints just runs while it is captured, and a log message says so."""
    here, hooks = threading.get_ident(), torch.autograd.graph.saved_tensors_hooks
    enter: Any = hooks.__enter__
    lost = False

    def told_enter(entered: Any) -> Any:
        nonlocal lost
        lost |= threading.get_ident() == here
        return enter(entered)

    def plain(function: Any, _: Any, *args: Any) -> Any:  # use_reentrant=True, which goes without gradients
        nonlocal lost
        lost = True
        return function(*args)

    reentrant = patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(plain))
    with _one_at_a_time, patch.object(hooks, "__enter__", told_enter), reentrant:
        yield
    if lost:
        logger.warning(
            "the forward of %s uses activation checkpointing (or other hooks on what is saved for backward), "
            "which a graph does not keep: checkpoint the transformed model, or transform its parts",
            type(model).__name__,
        )


_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def symbolic_trace(model: nn.Module) -> fx.Graph:
    """The graph of a model, by running its forward on proxies.

    Args:
        model: Left as it is, but for constants that the trace meets (``_tensor_constant0``).

    Raises:
        TraceError: The forward cannot be followed, or takes another path in eval mode than in training
            mode, and the message names the line; or it assigns a buffer.
        ValueError: A hook on the calls of the model is one of its methods, its forward is not that of its
            class, it has a ``__call__`` of its own, or the graph would read a name that is a keyword.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__} has a forward of its own, not that of its class, which symbolic trace "
            f"does not follow. Give transform example_inputs, or make it a subclass."
        )
    if type(model).__call__ is not nn.Module.__call__:
        raise ValueError(
            f"{type(model).__name__} has a __call__ of its own, which a symbolic trace does not follow. Give "
            f"transform example_inputs, or write it as forward."
        )
    hooks = (hook for name in _CALL_HOOKS for hook in vars(model)[name].values())
    if bound := [hook.__name__ for hook in hooks if getattr(hook, "__self__", None) is model]:
        # The model's class, and with it its methods, gives way to the graph's.
        raise ValueError(
            f"{type(model).__name__} has {bound[0]!r}, a method of its own, as a hook, which would go on "
            f"with the model as it is now. Register a function, which is given the module, or give transform "
            f"example_inputs."
        )
    # A trace may leave proxies and constants on what it runs, so each mode runs on a copy of its own.
    with _plain_checkpoints(model):
        (copied, graph), (other, evaluation) = (_trace(share(model), mode) for mode in (True, False))
    lines = [g.python_code("self").src.splitlines() for g in (graph, evaluation)]
    if lines[0] != lines[1]:
        pairs = itertools.zip_longest(*lines, fillvalue="")
        in_training, in_eval = next(pair for pair in pairs if pair[0] != pair[1])
        raise TraceError(
            f"The forward of {type(model).__name__} depends on self.training, which a graph fixes:\n"
            f"    in training: {in_training.strip()}\n    in eval:     {in_eval.strip()}\n"
            f"Use a module that switches by itself (nn.Dropout instead of F.dropout(..., self.training))."
        )
    _check_assigned(copied, other)
    _refuse_keywords(str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
    for node in graph.nodes:
        if node.op == "get_attr" and "." not in node.target and not hasattr(model, node.target):
            setattr(model, node.target, getattr(copied, node.target))
    return graph


def _refuse_keywords(fqns: Iterable[str]) -> None:
    for fqn in fqns:
        if found := [part for part in fqn.split(".") if keyword.iskeyword(part)]:
            raise ValueError(
                f"{fqn!r}: {found[0]!r} is a keyword of Python, which torch.fx cannot write in code. "
                f"Rename it, or leave it to torch.compile(model, backend='specnorm')."
            )


def _check_assigned(*traced: nn.Module) -> None:
    """What the forward assigns to attributes is lost: an error for buffers, a log message for others.

    Raises:
        TraceError: It assigns a buffer.
    """
    found: dict[str, bool] = {}
    for fqn, module in itertools.chain.from_iterable(model.named_modules() for model in traced):
        held = [(name, value, True) for name, value in module._buffers.items()]
        plain = [(name, value, False) for name, value in vars(module).items() if name != "_buffers"]
        for name, value, is_buffer in held + plain:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                found[f"{fqn}.{name}".removeprefix(".")] = is_buffer
    kind = type(traced[0]).__name__
    if buffers := [fqn for fqn, is_buffer in found.items() if is_buffer]:
        raise TraceError(
            f"The forward of {kind} assigns {', '.join(buffers)}, which a graph does not keep. Write to it "
            f"in place: buffer.copy_(...)."
        )
    if found:
        logger.warning(
            "the forward of %s sets %s, which that of the transformed model does not: return it",
            kind,
            ", ".join(found),
        )


def _trace(model: nn.Module, training: bool) -> tuple[nn.Module, fx.Graph]:
    for module in model.modules():
        module.training = training
    tracer = Tracer()
    try:
        if isinstance(model, TRANSPOSED):
            return model, _trace_without_output_size(tracer, model)
        return model, tracer.trace(model)
    except Exception as error:
        inside = next(reversed(tracer.module_stack), "")
        raise TraceError(
            f"Symbolic trace cannot follow the forward of {type(model).__name__}"
            f"{f', in its module {inside!r}' if inside else ''}: {error}\n{_user_line(error)}"
            f"Two ways out: move that line into a function marked with torch.fx.wrap, or capture the "
            f"model by torch.export: specnorm_fx.transform(model, example_inputs=...)."
        ) from error


def _trace_without_output_size(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """A ConvTranspose that is the whole model: its second argument, optional, cannot be traced."""
    graph = tracer.trace(model, concrete_args={"output_size": None})
    # fx asserts that the argument is None by a function which, once in generated code, breaks every
    # later trace in the process (torch 2.13: KeyError '..._assert_is_none'). So the argument goes.
    argument = graph.find_nodes(op="placeholder")[1]
    for check in list(argument.users):
        graph.erase_node(check)
    graph.erase_node(argument)
    return graph


def _user_line(error: Exception) -> str:
    """The innermost frame outside torch, as ``file:line`` and its source."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename.replace("\\", "/") and frame.filename != __file__:
            source = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"    {frame.filename}:{frame.lineno}: {source}\n"
    return ""


def export_trace(model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> fx.Graph:
    """The graph of a model, by ``torch.export`` on example inputs.

    Args:
        model: Left as it is, but for constants that the graph reads (``lifted_tensor_0``).
        example_inputs: One tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic_shapes: As in ``torch.export.export``; by default the shapes are those of the example.

    Returns:
        A graph over ``model``, in the mode that it is in, with nodes that check its inputs.

    Raises:
        TypeError: ``example_inputs`` are of another form, or not what the forward takes.
        ValueError: A parameter or buffer has a keyword of Python in its name, a part has backward hooks, or
            the forward assigns to ``data`` of a tensor.
        Exception: What ``torch.export`` raises when it cannot follow.
    """
    args, kwargs = _bound(model, example_inputs)
    _refuse_keywords(fqn for fqn, _ in itertools.chain(model.named_parameters(), model.named_buffers()))
    for fqn, part in model.named_modules():  # those of the model itself stay on it
        if fqn and (part._backward_hooks or part._backward_pre_hooks):
            raise ValueError(
                f"{fqn!r} ({type(part).__name__}) has backward hooks, which would not fire in the graph. "
                f"Remove them, or register them on the model itself."
            )
    # Not strict: the forward runs as Python, so that what cannot be compiled may stand in it.
    with _plain_checkpoints(model):
        program = torch.export.export(share(model), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    exported = program.module()
    compared = torch.ops.aten._has_compatible_shallow_copy_type.default
    if exported.graph.find_nodes(op="call_function", target=compared):
        # All that the graph has of an assignment to .data.
        raise ValueError(f"In the forward of {type(model).__name__}: {_ASSIGNED.format('data')}.")
    tidy_(exported.graph, exported)
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        hooks.clear()  # they are in the graph
    reads = (exported.graph.find_nodes(op=op) for op in ("get_attr", "call_module"))
    for node in itertools.chain.from_iterable(reads):
        owner, name = owner_of(model, node.target)
        if not hasattr(owner, name):
            constant = attribute(exported, node.target)
            if not isinstance(constant, Tensor):
                setattr(owner, name, constant)
            elif fqn := _name_of(constant, model):
                node.target = fqn
            else:
                owner.register_buffer(name, constant, persistent=False)
    return exported.graph


def _name_of(constant: Tensor, model: nn.Module) -> str | None:
    """The parameter or buffer that is a constant to ``torch.export``, as the forward has it from elsewhere.

    From a list of tensors, or from a function that holds the model itself.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((fqn for fqn, tensor in tensors if is_alias(constant, tensor)), None)


def is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in memory.

    Args:
        a: Any tensor.
        b: Another.
    """
    kinds = {(x.layout, x.dtype, x.device) for x in (a, b)}
    return kinds == {(torch.strided, a.dtype, a.device)} and a.is_set_to(b)


def _bound(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the order of the forward, in which the graph will take them."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        raise TypeError(
            f"example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, got {type(example_inputs).__name__}."
        )
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs must be arguments of {type(model).__name__}.forward{signature}: {error}."
        ) from error
    # Of one tensor given twice (real, fake) export would make one input, and the other would not be read.
    seen: set[int] = set()

    def alone(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) not in seen:
            seen.add(id(x))
            return x
        return x.detach().clone().requires_grad_(x.requires_grad)

    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(alone, (bound.args, bound.kwargs))
    return found


def find_weights(model: nn.Module, graph: fx.Graph) -> list[Weight]:
    """The weights that may be normalised, in module order.

    Those of Linear, Conv, ConvTranspose and Embedding layers, whether the graph reaches them or not, and
    parameters that the graph uses as such a weight in a function (``F.linear(x, self.projection)``).

    Args:
        model: The module tree.
        graph: A graph over it.

    Returns:
        One entry for each parameter, however many modules share it.
    """
    used_as = _functional_kinds(model, graph)
    found = []
    names_of = parameter_names(model)
    for parameter in model.parameters():
        names = names_of[id(parameter)]
        modules = tuple(n.rpartition(".")[0] for n in names)
        owners = [model.get_submodule(module) for module in modules]
        layers = [o for o in owners if isinstance(o, KINDS) and o.weight is parameter]
        kind = type(layers[0]) if layers else used_as.get(id(parameter))
        if kind is not None:
            found.append(Weight(names, modules, (layers or owners)[0], kind, parameter))

    by_parameter = {id(weight.parameter): weight for weight in found}
    for node in graph.nodes:
        used = None
        if node.op == "get_attr":
            used = attribute(model, node.target)
        elif node.op == "call_module":
            called = model.get_submodule(node.target)
            used = called._parameters.get("weight") if isinstance(called, KINDS) else None
        if id(used) in by_parameter:
            by_parameter[id(used)].nodes.append(node)
    return found


def _functional_kinds(model: nn.Module, graph: fx.Graph) -> dict[int, type[nn.Module]]:
    """By the id of a parameter: the layer type whose function uses it as weight."""
    kinds: dict[int, type[nn.Module]] = {}
    for node in graph.nodes:
        weight = _used_as_weight(node) if node.op == "call_function" else None
        if isinstance(weight, fx.Node) and weight.target is operator.getitem:
            weight = _stored(model, weight)
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            parameter = attribute(model, str(weight.target))
            if node.target in _CONVOLUTION:
                layers: Any = TRANSPOSED if node.args[_TRANSPOSED_FLAG] else CONVOLUTIONS
                kinds[id(parameter)] = layers[parameter.ndim - 3]
            else:
                kinds[id(parameter)] = _FUNCTIONS.get(node.target, nn.Linear)
    return kinds


def _used_as_weight(node: fx.Node) -> Any:
    """What a function takes as the weight of a layer."""
    target: Any = node.target
    if target in _FUNCTIONS or target in _CONVOLUTION:
        position = 0 if target is _ATEN.embedding.default else 1
        return node.args[position] if len(node.args) > position else node.kwargs.get("weight")
    # A recurrent layer is products with transposed weights too.
    if target in _PRODUCTS and ".rnn." not in layer_of(node)[1]:
        matrix: Any = node.args[_PRODUCTS[target]]
        while matrix.target in _EXPANSIONS:
            matrix = matrix.args[0]
        return matrix.args[0] if matrix.target in _TRANSPOSITIONS else None
    return None


def _stored(model: nn.Module, item: Any) -> Any:
    """The ``get_attr`` of the weight whose normalised form this item of a SpectralNorm call is."""
    call = spectral_norm_node(model) if isinstance(model, fx.GraphModule) else None
    return call.args[0][item.args[1]] if call is not None and item.args[0] is call else None


def computed_weights(model: nn.Module) -> dict[str, str]:
    """The weights of layers that are no parameters, by FQN, with why they are not normalised.

    Args:
        model: The module tree.
    """
    return {
        f"{fqn}.weight"
        if fqn
        else "weight": "computed from other parameters (a parametrization, weight_norm)"
        for fqn, layer in model.named_modules()
        if isinstance(layer, DEFAULT_KINDS)
        # Not by reading it, which computes it.
        if nn.utils.parametrize.is_parametrized(layer, "weight")
        or isinstance(vars(layer).get("weight"), Tensor)
    }


def obstacle(weight: Weight, model: nn.Module, graph: fx.Graph) -> str:
    """Why a weight cannot be reached in the graph.

    Args:
        weight: One without nodes.
        model: The module tree.
        graph: The graph over it.

    Returns:
        Half a sentence.
    """
    opaque = _opaque_parents(weight, model, graph)
    return f"inside {opaque[0]}, which the graph calls as a whole" if opaque else "not used in the forward"


def refuse_opaque_users(weight: Weight, model: nn.Module, graph: fx.Graph) -> None:
    """A tied weight is normalised for all its users, so each must be in sight.

    Args:
        weight: One to normalise.
        model: The module tree.
        graph: The graph over it.

    Raises:
        ValueError: One of the modules that share the weight is inside another that the graph calls as a
            whole.
    """
    opaque = _opaque_parents(weight, model, graph)
    if opaque:
        raise ValueError(
            f"{weight.fqn!r} is shared with a layer inside {opaque[0]}, which the graph calls as a whole and "
            f"which would go on using the weight before normalisation. Untie it, or leave it out of select."
        )


def _opaque_parents(weight: Weight, model: nn.Module, graph: fx.Graph) -> list[str]:
    """The modules around the owners of a weight that stand in the graph as one call."""
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    parents = (
        ".".join(parts[:depth])
        for parts in (module.split(".") for module in weight.modules)
        for depth in range(1, len(parts))
    )
    return [f"{p!r} ({type(model.get_submodule(p)).__name__})" for p in parents if p in called]


def inline(node: fx.Node, model: nn.Module) -> None:
    """Replace the call of a layer by the operations of its forward, the parameters as ``get_attr``.

    Args:
        node: A ``call_module`` of one of `KINDS`.
        model: The module tree of its graph.

    Raises:
        ValueError: The layer has hooks on its calls, a forward of its own, or a parametrization, which a
            trace cannot keep.
        TraceError: Its forward depends on the values or sizes it is given (``output_size``).
    """
    graph, fqn = node.graph, str(node.target)
    layer = model.get_submodule(fqn)
    leave_out = f"leave it out with select={{{fqn!r}: None, ...}}"
    if any(vars(layer)[name] for name in _CALL_HOOKS):
        raise ValueError(
            f"{fqn!r} ({type(layer).__name__}) has hooks, which would not fire in the graph. "
            f"Remove them, or {leave_out}."
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"{fqn!r} ({type(layer).__name__}) has a forward of its own, not that of its class, which "
            f"symbolic trace does not follow. Give transform example_inputs, or {leave_out}."
        )
    if nn.utils.parametrize.is_parametrized(layer):
        raise ValueError(
            f"{fqn!r} ({type(layer).__name__}) has a parametrization, which a symbolic trace does not "
            f"follow. Give transform example_inputs, or {leave_out}."
        )
    tracer = GraphAppendingTracer(graph)
    stand_in = copy.copy(layer)
    stand_in._parameters, stand_in._buffers = {}, {}
    known = set(graph.nodes)
    with graph.inserting_before(node):
        for name, tensor in (layer._parameters | layer._buffers).items():
            stand_in.__dict__[name] = (
                None if tensor is None else fx.Proxy(graph.get_attr(f"{fqn}.{name}"), tracer)
            )
        to_proxy: Any = lambda argument: fx.Proxy(argument, tracer)  # noqa: E731
        args: Any = fx.node.map_arg(node.args, to_proxy)
        kwargs: Any = fx.node.map_arg(node.kwargs, to_proxy)
        try:
            output = type(layer).forward(stand_in, *args, **kwargs)
        except TraceError as error:
            raise TraceError(
                f"The call of {fqn!r} ({type(layer).__name__}) cannot be followed: {error}. "
                f"A call with output_size depends on the input's size: give the layer an output_padding "
                f"instead, or {leave_out}."
            ) from error
    for new in graph.nodes:
        if new not in known:
            new.meta = copy.copy(node.meta)
    node.replace_all_uses_with(output.node)
    graph.erase_node(node)
