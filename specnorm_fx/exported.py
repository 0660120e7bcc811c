"""What ``torch.export`` leaves in a graph: checks of the inputs, and layers fixed in one mode."""

import copy
import functools
import inspect
import types
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.overrides import TorchFunctionMode

__all__ = ["fixed_layers", "layer_of", "tidy_"]


class CodeTracer(fx.Tracer):
    """Reads the code of a pickled graph, in which every operation must stay one.

    fx would run what has no input of the graph among its arguments: an update of a buffer, ``aten.rand``.
    """

    proxy_buffer_attributes = True

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """As in ``fx.Tracer``."""
        with _Recording(self):
            return super().trace(*args, **kwargs)


class _Recording(TorchFunctionMode):
    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def tidy_(graph: fx.Graph, model: nn.Module) -> None:
    """Take out of a graph what is torch's own way of keeping an exported program, in place.

    1. Reads of parameters that nothing uses go.
    2. The checks of the inputs, in a module ``_guards_fn`` around generated code that cannot be pickled,
       become nodes (but for checks that no trace can follow, an ``or``: they stay, and so the graph cannot
       be pickled). So does the check that an argument is None that was None when the graph was made, and
       of which the graph would ignore a value.
    3. When it is pickled, `CodeTracer` will read its code.

    Args:
        graph: A graph from ``torch.export``; any other stays as it is.
        model: The module tree over which it stands; the module of the checks is taken out.
    """
    if not isinstance(graph._codegen, _PyTreeCodeGen):
        return
    graph._tracer_cls = CodeTracer
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        known = set(graph.nodes)
        with graph.inserting_before(node):
            followed = _follow_checks(node, model.get_submodule("_guards_fn").forward)
        added = [new for new in graph.nodes if new not in known]
        if followed:
            for new in added:
                new.meta = copy.copy(node.meta)
            graph.erase_node(node)
            del model._modules["_guards_fn"]
        else:
            for new in reversed(added):
                graph.erase_node(new)


def _follow_checks(call: fx.Node, checks: Any) -> bool:
    """Run the checks on proxies for the inputs; False if they ask for a value."""
    tracer = GraphAppendingTracer(call.graph)
    arguments: Any = call.args
    inputs = [fx.Proxy(argument, tracer) for argument in arguments]
    generated = inspect.getclosurevars(checks).nonlocals.get("func", checks)  # torch wraps it for Dynamo
    # The builtins that it calls would ask for a value.
    names = {**generated.__globals__, "max": _largest, "min": _smallest}
    try:
        types.FunctionType(generated.__code__, names, closure=generated.__closure__)(*inputs)
    except (TraceError, TypeError):
        return False
    for argument, value in zip(arguments, inputs, strict=True):
        if argument.meta.get("val", argument) is None:
            # Not `is`, which no graph records.
            torch._assert(value == None, f"Guard failed: {argument.name} is None")  # noqa: E711
    return True


def _largest(*sizes: Any) -> Any:
    return functools.reduce(torch.sym_max, sizes)


def _smallest(*sizes: Any) -> Any:
    return functools.reduce(torch.sym_min, sizes)


def fixed_layers(graph: fx.Graph, training: bool) -> list[str]:
    """The layers of a graph that compute what they do in one mode, whatever ``train()`` says.

    Args:
        graph: Any graph. ATen operators that are told whether they train are found (dropout, batch norm and
            the like); a forward that reads ``self.training`` leaves no sign, and a dropout in eval mode
            none after ``run_decompositions()``.
        training: The mode.

    Returns:
        The FQN of each layer, or the name of the node where it has none.
    """
    functions = [node for node in graph.nodes if node.op == "call_function"]
    fixed = [node for node in functions if _fixed_mode(node) is training]
    return list(dict.fromkeys(layer_of(node)[0] or node.name for node in fixed))


def _fixed_mode(node: fx.Node) -> bool | None:
    target: Any = node.target
    if target is torch.ops.aten._native_batch_norm_legit_no_training.default:
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return None
    values = {argument.name: argument.default_value for argument in target._schema.arguments}
    values |= dict(zip(values, node.args, strict=False)) | node.kwargs
    # These compute the same in both modes: no running statistics, or a dropout of nothing.
    if "momentum" in values and values.get("running_mean") is None:
        return None
    if 0 in (values.get("p"), values.get("dropout")):
        return None
    if values.get("dropout_p"):  # attention, which knows no flag
        return True
    flags = [values[name] for name in ("train", "training", "use_input_stats") if name in values]
    return bool(flags[0]) if flags else None


def layer_of(node: fx.Node) -> tuple[str, str]:
    """The innermost module whose forward a node of an exported graph comes from.

    Args:
        node: Any node.

    Returns:
        Its FQN and its type as text; both are empty where the graph does not say.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0], str(stack[-1][1])) if stack else ("", "")
