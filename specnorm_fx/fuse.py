"""Torch's own spectral norm in a captured graph, fused into the one operator.

In the graphs that Dynamo captures (torch functions and methods, parameters and buffers as inputs) it looks
like this, the power iteration unrolled, and only in training mode::

    weight_mat = W.flatten(1)                                   # permuted before where dim is not 0
    u = F.normalize(torch.mv(weight_mat, v), out=u)             # the legacy hook: v first, then u
    v = F.normalize(torch.mv(weight_mat.H, u), out=v)
    sigma = torch.vdot(u.clone(), torch.mv(weight_mat, v.clone()))
    W / sigma

All that stand between the same changes of state (grad mode, autocast, levels of torch.func) become one call
of `specnorm_fx.ops.normalize` in the place of the first. A module that is called twice iterates twice, as in
eager mode: what starts from the u and v of another waits for it, in a second call.
"""

import copy
import inspect
import itertools
import logging
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specnorm_fx import checkpoint, ops, reference

__all__ = ["Fused", "Passed", "fqn_in_source", "fuse_", "fuse_graph_"]

logger = logging.getLogger(__name__)

NORMALIZE_EPS = 1e-12  # the default of F.normalize, and of torch's spectral norm


@dataclass(frozen=True)
class Fused:
    """A use of torch's spectral norm that became part of an operator call.

    Attributes:
        fqn: The parameter's FQN without spectral norm; the node's name where the graph does not tell it.
        shape: Of the weight.
        n_power_iterations: 0 in eval mode.
        dim: The output dimension.
        order: ``"uv"``, or ``"vu"`` for the legacy hook in training mode.
        divides: Whether ``W / sigma`` is in the same graph. Where DDP splits a graph it can be in the next
            one; then only the power iteration is fused, and sigma and the division stay.
    """

    fqn: str
    shape: tuple[int, ...]
    n_power_iterations: int
    dim: int
    order: str
    divides: bool


@dataclass(frozen=True)
class Passed:
    """What looks like spectral norm, or a part of it, and was passed through as it is.

    Attributes:
        fqn: As in `Fused`.
        reason: Why; half a sentence.
    """

    fqn: str
    reason: str


def fqn_in_source(node: fx.Node) -> str:
    """The FQN of a parameter without spectral norm, by where Dynamo found it.

    Args:
        node: The parameter's, a placeholder.

    Returns:
        The FQN within the module whose forward Dynamo captured; the node's name if its origin is not known.
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return str(node.target)
    name = source.name() if callable(source.name) else source.name  # a method until torch 2.11
    fqn = ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", name)) or name
    return checkpoint.fqn_of(fqn)[0]


def fuse_(
    gm: fx.GraphModule, implementation: str = "auto", name_of: Callable[[fx.Node], str] = fqn_in_source
) -> tuple[list[Fused], list[Passed]]:
    """Fuse torch's spectral norm in a captured graph, and in the graphs that it calls, in place.

    Results, gradients, u and v are what they were, up to rounding. Two things come out better: half-precision
    weights, and those under autocast, are computed in fp32; and where a product or sigma is not above eps,
    `specnorm_fx.reference` says what happens (torch gives NaN for a zero matrix).

    Args:
        gm: As Dynamo hands it to a backend; tensor nodes carry ``meta["example_value"]``.
        implementation: As in `specnorm_fx.SpectralNormConfig`. ``"reference"`` fuses the power iteration
            alone, in torch's operations; sigma and the division stay.
        name_of: Gives the FQN of a weight's node, for the result and the log.

    Returns:
        What was fused, and what looks like spectral norm and was left alone, in order of the graph.

    Raises:
        RuntimeError: A ``torch.compiler.nested_compile_region`` iterates: PyTorch drops what such a region
            writes, u and v here, without a word (torch 2.13).
    """
    regions = set(_nested_regions(gm))
    # Dynamo hands a tensor on to an inner graph by the same name, but says only here where it found it.
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    fused: list[Fused] = []
    passed: list[Passed] = []
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            found = fuse_graph_(
                module.graph, implementation, lambda node: name_of(inputs.get(node.name, node))
            )
            if module in regions and any(use.n_power_iterations for use in found[0]):
                raise RuntimeError(
                    f"{found[0][0].fqn} is normalised in a torch.compiler.nested_compile_region, which would "
                    f"lose its new u and v. Take the region off, or call the model in eval mode."
                )
            fused += found[0]
            passed += found[1]
            if found[0]:
                module.recompile()
    return fused, passed


def _nested_regions(gm: fx.GraphModule) -> Iterator[nn.Module]:
    """The bodies of ``torch.compiler.nested_compile_region`` in a graph, and in those that it calls."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(
                op="call_function", target=torch.ops.higher_order.invoke_subgraph
            ):
                yield module.get_submodule(node.args[0].target)


def fuse_graph_(
    graph: fx.Graph, implementation: str = "auto", name_of: Callable[[fx.Node], str] = fqn_in_source
) -> tuple[list[Fused], list[Passed]]:
    """`fuse_` for a graph without its module, which whoever holds it has to recompile.

    Args:
        graph: As in `fuse_`.
        implementation: As in `fuse_`.
        name_of: As in `fuse_`.

    Returns:
        As `fuse_`.
    """
    # To the head, where Dynamo has inputs. With Inductor's `freezing` it reads each where it is first used.
    head = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in graph.find_nodes(op="get_attr"):
        head.prepend(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    matches, refused, barriers = _find(graph, order, implementation)
    fused = [match.describe(name_of) for match in matches]
    passed = list({Passed(name_of(weight), why): None for weight, why in refused.items()})
    for use in fused:
        logger.info("spectral norm is fused: %s", use)
    for entry in passed:
        _log_once(entry)
    renamed: dict[fx.Node, fx.Node] = {}
    for first, batch in _batches(matches, order, barriers):
        _replace_(graph, first, batch, renamed, implementation)
    for match in matches:
        _erase_(graph, match)
    graph.lint()
    return fused, passed


_logged: set[Passed] = set()


def _log_once(entry: Passed) -> None:
    # A graph is captured again for every new shape and mode.
    if entry not in _logged:
        _logged.add(entry)
        logger.warning("%s is not fused: %s", entry.fqn, entry.reason)


# --- Recognition ---


class _NoMatchError(Exception):
    """Why some nodes are not torch's spectral norm, or cannot be moved."""


@dataclass(eq=False)
class _Match:
    """One computation of ``W / sigma``, or of sigma alone, in a graph.

    Attributes:
        weight: W.
        u: The buffer, or whatever else u comes from.
        v: Likewise.
        updates: The nodes of u and v after each iteration.
        eps: Torch's.
        dim: Torch's.
        order: Torch's.
        u_used: The u in sigma: u, its last update, or a clone of these.
        v_used: Likewise.
        quotient: ``W / sigma``; None where that is in another graph.
        views: The weight as a matrix and its transposes, which others may read as well.
        nodes: What the operator replaces, in order of the graph; nothing where there is no iteration and the
            division is to stay.
        numbers: Each eps that is a node, which can be far ahead of the rest.
    """

    weight: fx.Node
    u: fx.Node
    v: fx.Node
    updates: list[fx.Node]
    eps: float
    dim: int
    order: str
    u_used: fx.Node
    v_used: fx.Node
    quotient: fx.Node | None
    views: list[fx.Node]
    nodes: list[fx.Node]
    numbers: list[fx.Node]

    @property
    def iterations(self) -> int:
        return len(self.updates) // 2

    def describe(self, name_of: Callable[[fx.Node], str]) -> Fused:
        shape, fqn = tuple(_value(self.weight).shape), name_of(_origin(self.weight))
        return Fused(fqn, shape, self.iterations, self.dim, self.order, self.quotient is not None)


def _find(
    graph: fx.Graph, order: dict[fx.Node, int], implementation: str
) -> tuple[list[_Match], dict[fx.Node, str], list[int]]:
    """The matches, in order of the graph; by the weight's origin why others are none; changes of state."""
    matches: list[_Match] = []
    passed: dict[fx.Node, str] = {}
    updated_by: dict[fx.Node, _Match] = {}  # u and v after the last iteration of a match
    for node in graph.nodes:
        if not (_calls_plainly(node, torch.dot, torch.vdot) and _calls_plainly(node.args[1], torch.mv)):
            continue
        try:
            match = _match(node, updated_by, order, divides=implementation == "auto")
        except _NoMatchError as error:
            passed[_origin(node.args[1])] = str(error)
            continue
        if match.nodes:
            matches.append(match)
            updated_by |= dict.fromkeys(match.updates[-2:], match)

    barriers: list[int] = []
    # What is refused is no longer known to be harmless to the others: until nothing is.
    while matches:
        others = _Others(graph, matches)
        refused = {match: why for match in matches if (why := others.objection(match, order))}
        if not refused:
            barriers = [order[node] for node in others.barriers]
            break
        matches = [match for match in matches if match not in refused]
        passed |= {_origin(match.weight): why for match, why in refused.items()}

    replaced = {node for match in matches for node in match.nodes}
    for node in graph.nodes:
        if _is_update(node) and node not in replaced:
            passed.setdefault(_origin(node.args[0]), "its u and v are updated in a graph without its sigma")
    return matches, passed, barriers


def _match(
    sigma: fx.Node, updated_by: dict[fx.Node, _Match], order: dict[fx.Node, int], divides: bool
) -> _Match:
    """The computation that ends in ``sigma``, a dot product with ``torch.mv``."""
    product: Any
    u_used: Any
    u_used, product = sigma.args
    weight_mat, v_used = product.args
    weight, dim, views = _weight_of(weight_mat)
    if _value(weight).is_complex():
        raise _NoMatchError("the weight is complex, for which there is no operator")
    if _value(u_used).requires_grad or _value(v_used).requires_grad:
        raise _NoMatchError("gradient flows through u or v")

    clones = [x for x in (u_used, v_used) if _is_clone(x)]
    u, v = (x.args[0] if x in clones else x for x in (u_used, v_used))
    updates, products, eps, direction = _iterations(weight_mat, u, v, updated_by)
    if updates:
        first: Any = updates[:2]
        u, v = (node.kwargs["out"] for node in (first if direction == "uv" else reversed(first)))
    previous = updated_by.get(u)
    if previous is not None:
        u, v = previous.u, previous.v

    users = list(sigma.users)
    is_quotient = len(users) == 1 and _calls_plainly(users[0], operator.truediv, torch.div)
    is_quotient = is_quotient and users[0].args == (weight, sigma)
    if not is_quotient and not updates:
        raise _NoMatchError("its sigma is not used for W / sigma, or not for that alone")
    quotient = users[0] if is_quotient and divides else None
    nodes = {*updates, *products, *_grad_mode(updates, clones, products)}
    if updates or quotient is not None:
        nodes |= set(clones)
    if quotient is not None:
        nodes |= {*views, product, sigma, quotient}
    numbers = [node for update in updates if isinstance(node := update.kwargs.get("eps"), fx.Node)]
    in_order = sorted(nodes.difference(numbers), key=order.__getitem__)
    views += [node for node in products if not _calls(node, torch.mv)]
    return _Match(
        weight, u, v, updates, eps, dim, direction, u_used, v_used, quotient, views, in_order, numbers
    )


def _weight_of(weight_mat: fx.Node) -> tuple[fx.Node, int, list[fx.Node]]:
    """W, dim, and the nodes that make W a matrix."""
    views = []
    node: Any = weight_mat
    rest = tuple(_value(weight_mat).shape[1:])
    is_flattened = _is_method(node, "flatten") and node.args[1:] == (1,)
    if is_flattened or (_is_method(node, "reshape", "view") and _sizes(node)[1:] in ((-1,), rest)):
        views.append(node)
        node = node.args[0]
    dim = 0
    if _is_method(node, "permute"):
        dims = _sizes(node)
        if dims != (dims[0], *sorted(set(dims) - {dims[0]})):
            raise _NoMatchError(f"the weight is permuted to {dims}")
        dim = dims[0]
        views.append(node)
        node = node.args[0]
    shape = _value(node).shape
    if shape.numel() == 0:
        raise _NoMatchError("the weight is empty")
    m = shape[dim]
    if len(shape) < 2 or _value(weight_mat).shape != (m, shape.numel() // m):
        raise _NoMatchError("the matrix in torch.mv is not the weight with one dimension to the front")
    return node, dim, views


def _iterations(
    weight_mat: fx.Node, u: Any, v: Any, updated_by: dict[fx.Node, _Match]
) -> tuple[list[fx.Node], list[fx.Node], float, str]:
    """Back from the u and v in sigma: the updates, first one first, what they multiply, eps and order."""
    updates: list[fx.Node] = []
    products: list[fx.Node] = []
    found: set[tuple[float, str]] = set()
    while _is_update(u) and _is_update(v) and u not in updated_by and v not in updated_by:
        u_product, v_product = u.args[0], v.args[0]
        transposed = v_product.args[0]
        if u_product.args[0] is not weight_mat or not _is_transpose_of(transposed, weight_mat):
            raise _NoMatchError("u and v are updated with another matrix than sigma is computed with")
        old_u, old_v = u.kwargs["out"], v.kwargs["out"]
        if v_product.args[1] is u and u_product.args[1] is old_v:
            pair, direction = [u, v], "uv"
        elif u_product.args[1] is v and v_product.args[1] is old_u:
            pair, direction = [v, u], "vu"
        else:
            raise _NoMatchError("u and v are not updated one from the other, as torch does")
        updates[:0] = pair
        given = [x.kwargs.get("eps", NORMALIZE_EPS) for x in pair]
        products += [u_product, v_product, transposed, *(x for x in given if isinstance(x, fx.Node))]
        found |= {(_number(x), direction) for x in given}
        u, v = old_u, old_v
    if len(found) > 1:
        raise _NoMatchError("its iterations differ in eps or order")
    if _is_update(u) != _is_update(v) or updated_by.get(u) is not updated_by.get(v):
        raise _NoMatchError("u and v are not updated together")
    eps, direction = found.pop() if found else (NORMALIZE_EPS, "uv")
    return updates, products, eps, direction


def _grad_mode(updates: list[fx.Node], clones: list[fx.Node], products: list[fx.Node]) -> list[fx.Node]:
    """What switches gradients off before the iterations, and back after them."""
    if not updates:
        return []
    before, after = updates[0].prev, updates[-1].next
    while before in products:
        before = before.prev
    while after in clones:
        after = after.next
    pair = [before, after]
    return pair if all(_calls(node, torch._C._set_grad_enabled) for node in pair) else []


class _Others:
    """The nodes of a graph that no match replaces, and what they do to the tensors that matches use.

    Args:
        graph: The graph.
        matches: The matches so far.
    """

    def __init__(self, graph: fx.Graph, matches: list[_Match]) -> None:
        self.replaced = {node for match in matches for node in match.nodes}
        self.barriers: list[fx.Node] = []
        self.readers: dict[int, fx.Node] = {}
        self.writers: dict[int, fx.Node] = {}
        self.results = {_storage(node) for node in graph.output_node().all_input_nodes}
        self.returned: dict[Any, _Match] = {}
        for node in graph.nodes:
            if node in self.replaced or node.op in ("placeholder", "get_attr", "output"):
                continue
            storages = [storage for x in node.all_input_nodes if (storage := _storage(x)) is not None]
            self.readers |= dict.fromkeys(storages, node)
            if _may_write(node):
                self.writers |= dict.fromkeys(storages, node)
            if "example_value" not in node.meta:
                self.barriers.append(node)

    def objection(self, match: _Match, order: dict[fx.Node, int]) -> str | None:
        """Why a match cannot be computed at another place of the graph, or None if it can."""
        for name, node in (("the weight", match.weight), ("u", match.u), ("v", match.v)):
            storage = _storage(node)
            if storage is None:
                return f"{name} is not an ordinary tensor in this graph"
            if storage in self.writers:
                return f"{name} may be changed in place by {self.writers[storage].name}"
            if match.updates and name != "the weight" and storage in self.readers:
                return f"{name} is read by {self.readers[storage].name} as well"
        if match.quotient is not None and (storage := _storage(match.quotient)) in self.writers:
            return f"W / sigma may be changed in place by {self.writers[storage].name}"
        if match.quotient is not None and _storage(match.quotient) in self.results and not match.updates:
            # AOTAutograd makes one call of two equal ones; their results, of which one may carry no gradient,
            # would be one tensor. Equal are those of a computed weight, too, computed twice.
            key = (_storage(match.u), _storage(match.v), match.dim)
            if self.returned.setdefault(key, match) is not match:
                return "the graph has it among its results more than once"
        shared = {match.quotient, *match.updates, *match.views}
        if match.quotient is None:
            shared |= {match.u_used, match.v_used}
        for node in match.nodes:
            user = next((user for user in node.users if user not in self.replaced), None)
            if node not in shared and user is not None:
                return f"{node.name}, a part of it, is used by {user.name} as well"
        first, last = order[match.nodes[0]], order[match.nodes[-1]]
        if any(first < order[barrier] < last for barrier in self.barriers):
            return "the state that it is computed in changes in between"
        return None


# Python's operators that write, as functions (iadd) and as methods (__iadd__).
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset({"setitem", *(f"i{name}" for name in _ARITHMETIC + _BITWISE)})


def _may_write(node: fx.Node) -> bool:
    """Whether a node may change the tensors that it is given."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    # An embedding with max_norm cuts the rows of its weight.
    if "out" in node.kwargs or _argument(node, "inplace") or _argument(node, "max_norm") is not None:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        # What it runs: a checkpointed part, say, or both directions of an autograd.Function.
        read = (str(x.target) for x in node.all_input_nodes if x.op == "get_attr")
        values = [getattr(node.graph.owning_module, name, None) for name in read]
        bodies = [value.graph for value in values if isinstance(value, fx.GraphModule)]
        return not bodies or any(_may_write(inner) for body in bodies for inner in body.nodes)
    if node.op == "call_module":
        return True
    overloads = [node.target] if isinstance(node.target, torch._ops.OpOverload) else []
    if isinstance(node.target, torch._ops.OpOverloadPacket):  # torch.ops.mylib.clip, as Dynamo finds it
        overloads = [getattr(node.target, name) for name in node.target.overloads()]
    if overloads:
        arguments = [argument for overload in overloads for argument in overload._schema.arguments]
        written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return any(not a.is_out or a.name in node.kwargs for a in written)
    name = _name(node)
    written_so = (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _IN_PLACE
    return written_so or (node.op == "call_function" and _is_foreign(node))


def _is_foreign(node: fx.Node) -> bool:
    """Whether a function is code that nobody looks into: what is ``allow_in_graph``, or one of NumPy's."""
    module = getattr(node.target, "__module__", None) or "torch"  # methods in C have none
    # Dynamo's names for what calls NumPy, and an autograd.Function that is allow_in_graph.
    is_wrapper = _name(node).startswith(("wrapped_", "trampoline_"))
    return is_wrapper or module.partition(".")[0] not in ("torch", "_operator", "builtins", "math")


def _argument(node: fx.Node, name: str) -> Any:
    """What a function is given by keyword or by position, or None."""
    if node.op == "call_function" and len(node.args) > 1:
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
            return bound.arguments.get(name)
        except (TypeError, ValueError):  # most that are written in C++ do not tell
            pass
    return node.kwargs.get(name)


# --- Rewriting ---


def _batches(
    matches: list[_Match], order: dict[fx.Node, int], barriers: list[int]
) -> list[tuple[fx.Node, list[_Match]]]:
    """What can run through one operator call, with the node before which that goes, in order of the graph.

    A match goes to the front, to the first match since the last change of state, if what it reads is known
    there; else a new row begins. Within a row, those that start from the u and v of others come later.
    """
    rows: list[tuple[fx.Node, list[list[_Match]]]] = []
    for match in sorted(matches, key=lambda match: order[match.nodes[0]]):
        here = order[match.nodes[0]]
        begun = order[rows[-1][0]] if rows else here
        is_known = all(order[node] < begun for node in (match.weight, match.u, match.v))
        if not rows or not is_known or any(begun < barrier < here for barrier in barriers):
            rows.append((match.nodes[0], []))
        row = rows[-1][1]
        waits_for = [i for i, batch in enumerate(row) if any(_share_vectors(match, m) for m in batch)]
        position = waits_for[-1] + 1 if waits_for else 0
        row[position : position + 1] = [[*row[position], match] if position < len(row) else [match]]
    return [
        (first, [part[i] for i in group])
        for first, row in rows
        for batch in row
        for part in _parted(batch)
        for group in ops.groups([_value(match.weight) for match in part])
    ]


def _share_vectors(match: _Match, other: _Match) -> bool:
    vectors = [{_storage(m.u), _storage(m.v)} for m in (match, other)]
    return bool(vectors[0] & vectors[1]) and bool(match.updates or other.updates)


def _is_singled_out(match: _Match) -> bool:
    """Whether a gradient is asked for at this ``W / sigma``, where it must not count for other readers."""
    users = [] if match.quotient is None else match.quotient.users
    return any(_name(user) in ("grad", "backward", "register_hook", "retain_grad") for user in users)


def _parted(batch: list[_Match]) -> list[list[_Match]]:
    """Those with and those without the division, which takes another operator."""
    parts = [[match for match in batch if (match.quotient is None) == only] for only in (False, True)]
    return [part for part in parts if part]


def _replace_(
    graph: fx.Graph,
    first: fx.Node,
    matches: list[_Match],
    renamed: dict[fx.Node, fx.Node],
    implementation: str,
) -> None:
    """One operator call for some matches, and its results to all who used theirs, in place.

    ``renamed`` maps each ``W / sigma`` so far to what took its place: it can be a weight here.
    """
    # In eval mode a module that is called twice gives one weight twice.
    keys = [(m.weight, m.u, m.v, m.dim, m if m.updates or _is_singled_out(m) else None) for m in matches]
    sites = dict(zip(keys, matches, strict=True))
    columns = list(sites.values())
    weights = [renamed.get(m.weight, m.weight) for m in columns]
    us, vs = [m.u for m in columns], [m.v for m in columns]
    counts = [m.iterations or reference.AS_STORED for m in columns]
    options = (counts, [m.eps for m in columns], [m.dim for m in columns], [m.order for m in columns])
    with graph.inserting_before(first):
        if columns[0].quotient is not None:
            call = graph.call_function(ops.normalize, (weights, us, vs, *options))
            _update_(graph, columns, _parts(graph, call, columns))
            results = graph.call_function(operator.getitem, (call, 2))
            normalized = dict(zip(sites, _items(graph, results, len(columns)), strict=True))
            for key, match in zip(keys, matches, strict=True):
                quotient: Any = match.quotient
                renamed[quotient] = normalized[key]
                normalized[key].meta = copy.copy(quotient.meta)
                quotient.replace_all_uses_with(normalized[key])
            return
        stored = [graph.call_method("detach", (weight,)) for weight in weights]
        if implementation == "auto":
            call = graph.call_function(ops.power_iteration, (stored, us, vs, *options))
            fresh = _parts(graph, call, columns)
        else:
            call = graph.call_function(ops.singular_vectors, (stored, us, vs, *options))
            fresh = _items(graph, call, 2 * len(columns))
        _update_(graph, columns, fresh)
        used = [m.u_used for m in columns] + [m.v_used for m in columns]
        for old, new in zip(used, fresh, strict=True):
            old.replace_all_uses_with(graph.call_method("to", (new, _value(old).dtype)))


def _parts(graph: fx.Graph, call: fx.Node, matches: list[_Match]) -> list[fx.Node]:
    """All u, then all v, out of the first result of an operator; nothing where they stay as they are."""
    if not any(match.updates for match in matches):
        return []
    sizes = [int(_value(x).shape[0]) for match in matches for x in (match.u, match.v)]
    vectors = graph.call_function(operator.getitem, (call, 0))
    parts = _items(graph, graph.call_function(torch.split, (vectors, sizes)), len(sizes))
    return parts[::2] + parts[1::2]


def _update_(graph: fx.Graph, matches: list[_Match], fresh: list[fx.Node]) -> None:
    """Copy new u and v to where the old ones are kept."""
    buffers = [m.u for m in matches] + [m.v for m in matches]
    moved = [bool(match.updates) for match in matches] * 2
    if any(moved):
        pairs = (buffers, fresh)
        graph.call_function(ops.store_, tuple([*itertools.compress(x, moved)] for x in pairs))


def _items(graph: fx.Graph, node: fx.Node, count: int) -> list[fx.Node]:
    return [graph.call_function(operator.getitem, (node, index)) for index in range(count)]


def _erase_(graph: fx.Graph, match: _Match) -> None:
    vectors = {"uv": (match.u, match.v), "vu": (match.v, match.u)}[match.order]
    for k, update in enumerate(match.updates):
        # What remains is the graph's result, of which Dynamo makes the module's buffer.
        update.replace_all_uses_with(vectors[k % 2])
    for node in [*reversed(match.nodes), *dict.fromkeys(match.numbers)]:
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


# --- Nodes ---


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _calls(node: Any, *functions: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def _calls_plainly(node: Any, *functions: Any) -> bool:
    """Without ``out``, a rounding mode or the like."""
    return _calls(node, *functions) and not node.kwargs


def _is_method(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def _is_clone(node: Any) -> bool:
    return _is_method(node, "clone")


def _is_update(node: Any) -> bool:
    """``F.normalize(torch.mv(...), dim=0, out=...)``."""
    return (
        _calls(node, F.normalize)
        and len(node.args) == 1
        and _calls_plainly(node.args[0], torch.mv)
        and isinstance(node.kwargs.get("out"), fx.Node)
        and node.kwargs.get("dim") == 0
        and node.kwargs.get("p", 2) == 2
    )


def _is_transpose_of(node: Any, weight_mat: fx.Node) -> bool:
    is_attribute = _calls(node, getattr) and node.args[1] in ("H", "T", "mH", "mT")
    return (is_attribute or _is_method(node, "t")) and node.args[0] is weight_mat


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of permute, reshape or view, given one by one or as a tuple."""
    first = node.args[1]
    return tuple(first) if isinstance(first, tuple | list) else tuple(node.args[1:])


def _value(node: Any) -> Tensor:
    """The (fake) tensor that a node stands for."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise _NoMatchError(f"the graph does not tell what {node} is")
    return value


def _number(x: Any) -> float:
    """An eps, which under ``dynamic=True`` can be an input of the graph: fixed, with a guard."""
    return float(x.meta["example_value"] if isinstance(x, fx.Node) else x)


def _storage(node: fx.Node) -> int | None:
    """What two nodes have in common that share memory; None for wrapped tensors (torch.func, DTensor)."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    if is_traceable_wrapper_subclass(value):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # sparse
        return None


def _origin(node: fx.Node) -> fx.Node:
    """The weight that a node, or the matrix made of it, comes from."""
    while node.op != "placeholder" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
