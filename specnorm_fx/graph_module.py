"""SpectralNormGraphModule: what `transform` returns, a GraphModule that keeps the model's whole state."""

import pickle
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from specnorm_fx import checkpoint, reference, sharded
from specnorm_fx.config import SpectralNormConfig
from specnorm_fx.exported import fixed_layers
from specnorm_fx.module import SpectralNorm

__all__ = [
    "Site",
    "SpectralNormGraphModule",
    "attribute",
    "owner_of",
    "parameter_names",
    "resolve",
    "sites_of",
    "spectral_norm_node",
    "transformed",
]


@dataclass(frozen=True)
class Site:
    """One normalised weight of a transformed model.

    Attributes:
        fqn: The parameter's FQN.
        names: All its FQNs, ``fqn`` first; more than one for a tied weight.
        config: Its options, ``dim`` resolved.
        weight: The stored parameter, before division by sigma; a ``DTensor`` if it is sharded.
        u: Its left vector ``[m]``, a buffer; whole on every rank.
        v: Its right vector ``[n]``, likewise.
    """

    fqn: str
    names: tuple[str, ...]
    config: SpectralNormConfig
    weight: Tensor
    u: Tensor
    v: Tensor

    def matrix(self) -> Any:
        """The stored weight, detached, as in `sharded.matrix`."""
        return sharded.matrix(self.weight.detach(), self.config.dim or 0)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """U and v in the dtype of `matrix`."""
        dtype = reference.compute_dtype(self.weight)
        return self.u.to(dtype), self.v.to(dtype)


class SpectralNormGraphModule(fx.GraphModule):
    """A GraphModule whose graph normalises weights through one `SpectralNorm` call.

    It differs from a plain ``fx.GraphModule`` in

    1. it keeps every module, parameter, buffer and plain attribute of the model it was captured from, used
       in the graph or not, of the types they were: ``state_dict`` has the same keys plus u and v, and
       ``apply(init_weights)`` still finds the layers. Only the graph runs: calling such a layer by
       hand uses its stored weight, and its forward hooks do not fire;
    2. all of that, and the class itself, survives ``deepcopy`` and ``pickle``;
    3. ``load_state_dict`` reads every layout of `specnorm_fx.convert_state_dict`; where u and v are
       not in the checkpoint they converge to the loaded weight;
    4. u and v stay in fp32 where ``half()``, ``bfloat16()`` or ``to(dtype)`` of the model, or of a parent,
       turn the weights to half precision, and where a checkpoint has them in it;
    5. ``train`` and ``eval`` refuse a mode that the graph cannot follow, see `train`.

    Args:
        root: Module tree to keep; its objects are taken over, not copied.
        graph: The graph over that tree.
        class_name: Shown by ``repr``; the original model's.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str) -> None:
        super().__init__(root, graph, class_name)
        # GraphModule registers plain tensors of the root (constants met in the trace) as buffers.
        constants = self._buffers.keys() - root._buffers.keys()
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)
        self._buffers = dict(root._buffers) | {name: self._buffers[name] for name in constants}
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set) | constants
        for name, value in vars(root).items():
            self.__dict__.setdefault(name, value)

    def train(self, mode: bool = True) -> "SpectralNormGraphModule":
        """As in ``nn.Module``, for layers that the graph calls as modules, and for spectral norm.

        Args:
            mode: Training or eval.

        Raises:
            RuntimeError: ``torch.export`` has fixed layers (dropout, batch norm) in the other mode.
        """
        if mode != self.training:
            fixed = fixed_layers(self.graph, training=not mode)
            if fixed:
                here, there = ("eval", "training") if mode else ("training", "eval")
                raise RuntimeError(
                    f"{type(self).__name__} cannot go to {there} mode: torch.export has fixed "
                    f"{', '.join(map(repr, fixed))} in {here} mode. Capture the model in {there} mode too, "
                    f"transform(model.{'train' if mode else 'eval'}(), example_inputs=...), and load this "
                    f"state_dict into it."
                )
        super().train(mode)
        return self

    def recompile(self) -> Any:
        """As in ``fx.GraphModule``, after an edit of the graph."""
        code = super().recompile()
        # Written down, because Dynamo does not look into a graph, and update_ is to be compiled.
        node = spectral_norm_node(self)
        self._call = None if node is None else (node.target, [[n.target for n in arg] for arg in node.args])
        return code

    def call(self) -> tuple[SpectralNorm, list[Tensor], list[Tensor], list[Tensor]] | None:
        """What the graph calls, and with what.

        Returns:
            The `SpectralNorm`, the stored weights, u and v; or None for a frozen model.
        """
        if self._call is None:
            return None
        target, columns = self._call
        weights, us, vs = ([attribute(self, fqn) for fqn in column] for column in columns)
        spectral_norm: Any = self.get_submodule(target)
        return spectral_norm, weights, us, vs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpectralNormGraphModule":
        # In half precision u and v stop where an iteration moves them by less than a rounding, short of the
        # singular vectors: for close singular values sigma was up to 1e-3 off in bf16.
        before = {fqn: attribute(self, fqn) for fqn in self._vector_fqns()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for fqn, vector in before.items():
            turned = attribute(self, fqn)
            dtype = reference.compute_dtype(turned)
            if turned.dtype != dtype:
                setattr(*owner_of(self, fqn), vector.to(turned.device, dtype))
        return self

    def _vector_fqns(self) -> list[str]:
        return [] if self._call is None else [*self._call[1][1], *self._call[1][2]]

    def sites(self) -> list[Site]:
        """The normalised weights, in the order of the graph."""
        call = self.call()
        if call is None or self._call is None:
            return []
        spectral_norm, *columns = call
        names = parameter_names(self)
        fqns = self._call[1][0]
        return [
            Site(fqn, names[id(weight)], config, weight, sharded.local(u), sharded.local(v))
            for fqn, config, weight, u, v in zip(fqns, spectral_norm.configs, *columns, strict=True)
        ]

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        # At the root, before the children load: each of them sees only its own keys.
        for site in self.sites():
            for name in site.names[1:]:
                checkpoint.adapt_(state_dict, prefix + name)
                for key in (f"{prefix}{name}_u", f"{prefix}{name}_v"):
                    state_dict.pop(key, None)  # u and v stand beside the first name only
            stale = checkpoint.adapt_(state_dict, prefix + site.fqn)
            if stale is not None:
                u, v = _converged(site, *stale)
                state_dict[f"{prefix}{site.fqn}_u"] = u
                state_dict[f"{prefix}{site.fqn}_v"] = v
        for key in (prefix + fqn for fqn in self._vector_fqns()):
            if key in state_dict:  # in half precision it would stay so, loaded with assign=True
                state_dict[key] = state_dict[key].to(reference.compute_dtype(state_dict[key]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _deepcopy_init(self) -> Any:
        name = type(self).__name__
        return lambda copy, root, graph: SpectralNormGraphModule.__init__(copy, root, graph, name)

    def __reduce__(self) -> tuple[Any, ...]:
        for node in self.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise pickle.PicklingError(
                    f"{type(self).__name__} cannot be pickled: its graph calls torch's {node.target}, which "
                    f"torch.fx cannot read back. Save its state_dict."
                )
        _, (body, imports) = super().__reduce__()
        return _rebuild, (body, imports, type(self).__name__)


def _rebuild(body: dict[str, Any], imports: str, class_name: str) -> SpectralNormGraphModule:
    """Unpickle: GraphModule stores code and traces it again, but drops what the graph does not use."""
    root = nn.Module()
    root.__dict__.update(body)
    graph: Any = reduce_graph_module(body, imports).graph
    return SpectralNormGraphModule(root, graph, class_name)


def _converged(site: Site, loaded: Tensor, loaded_u: Tensor | None) -> tuple[Tensor, Tensor]:
    if loaded.shape != site.weight.shape:
        return site.u, site.v  # PyTorch reports the weight
    weight = loaded.detach().to(device=site.weight.device, dtype=site.weight.dtype)
    weight_mat = sharded.matrix(weight, site.config.dim or 0)
    (u, v), order = reference.random_start(*site.vectors()), site.config.order
    if loaded_u is not None and loaded_u.shape == u.shape:
        u, order = loaded_u.to(u), "vu"  # the other order would start from v
    return reference.converge(weight_mat, u, v, site.config.eps, order)


def spectral_norm_node(gm: fx.GraphModule) -> Any:
    """The call of `SpectralNorm` in a graph.

    Args:
        gm: Any GraphModule.

    Returns:
        The ``fx.Node``, of which there is at most one, or ``None``.
    """
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), SpectralNorm):
            return node
    return None


def attribute(module: nn.Module, fqn: str) -> Any:
    """What a ``get_attr`` node reads.

    Args:
        module: The module tree of its graph.
        fqn: The node's target.
    """
    return getattr(*owner_of(module, fqn))


def owner_of(module: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The module that holds an attribute, and the attribute's name there.

    Args:
        module: The module tree.
        fqn: The attribute.
    """
    owner, _, name = fqn.rpartition(".")
    return module.get_submodule(owner), name


def parameter_names(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """All FQNs of every parameter, by its ``id``; more than one for a tied parameter.

    Args:
        module: The module tree.

    Returns:
        In module order, the names of a parameter as well.
    """
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def transformed(model: nn.Module) -> dict[str, SpectralNormGraphModule]:
    """The transformed models in a model: itself, inside ``torch.compile``, DDP, AveragedModel or a parent.

    Args:
        model: The transformed model, or a module that holds one or more.

    Returns:
        By what stands before its FQNs: nothing where there is one, ``"name."`` of the module in ``model``
        where there are several.

    Raises:
        TypeError: There is none.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: module for name, module in modules if isinstance(module, SpectralNormGraphModule)}
    if not found:
        raise TypeError(
            f"{type(model).__name__} holds no transformed model. specnorm_fx.transform(model) makes one."
        )
    # Of several none is the model itself, as they do not stand in each other.
    return {f"{name}." if len(found) > 1 else "": gm for name, gm in found.items()}


def resolve(model: nn.Module) -> SpectralNormGraphModule:
    """The one transformed model in a model.

    Args:
        model: As in `transformed`.

    Raises:
        TypeError: There is none, or more than one.
    """
    found = transformed(model)
    if len(found) > 1:
        raise TypeError(
            f"{type(model).__name__} holds {len(found)} transformed models, and this function works on one: "
            f"{', '.join(repr(prefix[:-1]) for prefix in found)}. Give it one after the other."
        )
    return next(iter(found.values()))


def sites_of(model: nn.Module) -> dict[str, Site]:
    """The normalised weights of all transformed models in a model.

    Args:
        model: As in `transformed`.

    Returns:
        By FQN: that in the transformed model, or, where there are several of them, that in ``model``.

    Raises:
        TypeError: As in `transformed`.
    """
    return {prefix + site.fqn: site for prefix, gm in transformed(model).items() for site in gm.sites()}
