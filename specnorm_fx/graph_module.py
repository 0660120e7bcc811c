"""SpectralNormGraphModule: what `transform` returns, a GraphModule that keeps the model's whole state."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module
from torch.nn.modules.module import _WrappedHook

from specnorm_fx import checkpoint, reference, sharded
from specnorm_fx.config import SpectralNormConfig
from specnorm_fx.exported import fixed_layers
from specnorm_fx.module import SpectralNorm

__all__ = [
    "Site",
    "SpectralNormGraphModule",
    "attribute",
    "is_parameter",
    "owner_of",
    "parameter_names",
    "resolve",
    "sites_of",
    "spectral_norm_node",
    "transformed",
]

# The attributes under which wrappers have the model: DDP and AveragedModel, torch.compile,
# checkpoint_wrapper, FSDP1.
_WRAPPED = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}

# Where a module keeps its hooks.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)

# What runs in place of the graph, by nn.Module.compile or set by hand. A copy has none of it: it would run
# the original, with its tensors.
_REPLACED = ("_compiled_call_impl", "forward")


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

    @property
    def dim(self) -> int:
        """The output dimension of the weight."""
        return self.config.dim or 0

    def matrix(self) -> Any:
        """The stored weight, detached, as in `sharded.matrix`."""
        return sharded.matrix(self.weight.detach(), self.dim)

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
    2. all of that, hooks on the model, and the class itself, survives ``copy``, ``deepcopy`` and ``pickle``;
    3. ``load_state_dict`` reads every layout of `specnorm_fx.convert_state_dict`; where u and v are
       not in the checkpoint they converge to the loaded weight;
    4. u and v stay in fp32 where ``half()``, ``bfloat16()`` or ``to(dtype)`` of the model, or of a parent,
       turn the weights to half precision, and where a checkpoint has them in it;
    5. ``train`` and ``eval`` refuse a mode that the graph cannot follow, see `train`.

    Args:
        root: Module tree to keep; its objects are taken over, not copied.
        graph: The graph over that tree.
        class_name: Shown by ``repr``; the original model's.

    Raises:
        ValueError: A module, parameter or buffer of the root has the name of one of this class's
            attributes, or an attribute that of one of its methods.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str) -> None:
        found = {*root._modules, *root._parameters, *root._buffers} & _OWN_NAMES
        if taken := sorted(found | (vars(root).keys() & {"call", "sites"})):
            raise ValueError(
                f"{class_name} has an attribute named {taken[0]!r}, which a transformed model has for "
                f"something else. Rename it."
            )
        super().__init__(root, graph, class_name)
        # GraphModule registers plain tensors of the root (constants met in the trace) as buffers.
        constants = self._buffers.keys() - root._buffers.keys()
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)
        self._buffers = dict(root._buffers) | {name: self._buffers[name] for name in constants}
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set) | constants
        for name, value in vars(root).items():
            if name in _REPLACED:
                continue
            if name in _HOOKS:
                self.__dict__[name] = copy.copy(value)  # handles of the original's take off the original's
            self.__dict__.setdefault(name, value)
        for key, hook in self._hooks_of_module().items():
            self._load_state_dict_pre_hooks[key] = _WrappedHook(hook, self)
        self._tied_names: dict[str, tuple[str, ...]] = vars(root).get("_tied_names", {})
        self._note_names()

    def _hooks_of_module(self) -> dict[int, Callable[..., Any]]:
        """Those that are given the module, by their keys: PyTorch keeps them with a reference to it."""
        hooks: dict[int, Any] = self._load_state_dict_pre_hooks
        return {key: x.hook for key, x in hooks.items() if getattr(x, "with_module", False)}

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
        """As in ``fx.GraphModule``, after an edit of the graph.

        Raises:
            ValueError: The edit put an operation between a stored weight, u or v and the `SpectralNorm` call.
        """
        code = super().recompile()
        # Written down, because Dynamo does not look into a graph, and update_ is to be compiled.
        node = spectral_norm_node(self)
        others = [] if node is None else [n for arg in node.args for n in arg if n.op != "get_attr"]
        if others:
            raise ValueError(
                f"SpectralNorm takes stored weights, u and v, which update_, report and freeze find by their "
                f"names, and the graph gives it {', '.join(n.name for n in others)}. Edit what comes out of "
                f"the call."
            )
        self._call = None if node is None else (node.target, [[n.target for n in arg] for arg in node.args])
        self._note_names()
        return code

    def _note_names(self) -> None:
        """Write down the names of tied weights. What unties them (``assign=True``) leaves the graph alone."""
        known, current = vars(self).get("_tied_names", {}), parameter_names(self)
        weights = [] if self._call is None else self._call[1][0]
        found = {fqn: current.get(id(attribute(self, fqn)), ()) for fqn in weights}
        self._tied_names = known | {
            fqn: tuple(dict.fromkeys([*known.get(fqn, ()), *names])) for fqn, names in found.items()
        }

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
        current = parameter_names(self)
        there = {name for names in current.values() for name in names}
        fqns = self._call[1][0]

        def names(fqn: str, weight: Tensor) -> tuple[str, ...]:
            noted = (name for name in self._tied_names[fqn] if name in there)
            found = dict.fromkeys([fqn, *noted, *current.get(id(weight), ())])
            # Weights tied after transform have each their own u and v.
            return tuple(name for name in found if name == fqn or name not in fqns)

        return [
            Site(fqn, names(fqn, weight), config, weight, sharded.local(u), sharded.local(v))
            for fqn, config, weight, u, v in zip(fqns, spectral_norm.configs, *columns, strict=True)
        ]

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        # At the root, before the children load: each of them sees only its own keys.
        assigns = local_metadata.get("assign_to_params_buffers", False)
        for site in self.sites():
            # One that is computed from other parameters, as a parametrization does, has keys of its own.
            if is_parameter(self, site.fqn):
                self._adapt_(state_dict, prefix, site, assigns)
        for key in (prefix + fqn for fqn in self._vector_fqns()):
            if isinstance(x := state_dict.get(key), Tensor):  # in half precision it would stay so, assigned
                state_dict[key] = x.to(reference.compute_dtype(x))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _adapt_(self, state_dict: MutableMapping[str, Any], prefix: str, site: Site, assigns: bool) -> None:
        """From any layout, a weight and its u and v under the names that they have here."""
        names = [prefix + name for name in site.names]
        stale = {name: checkpoint.adapt_(state_dict, name) for name in names}
        given = names[0]
        if not assigns:  # writers that keep one name of a shared tensor may have kept another one
            given = next((name for name in names if name in state_dict), given)
        # u and v stand beside the first name; and the others of its layer, if that has several.
        owner, _ = owner_of(self, site.fqn)
        own = [prefix + name for name in site.names if owner_of(self, name)[0] is owner]
        source = next((name for name in (given, *own) if f"{name}_v" in state_dict), given)
        pair = [state_dict.get(source + suffix) for suffix in ("_u", "_v")]
        if pair[1] is None and (found := stale[given]) is not None:
            vectors = zip(_converged(site, *found, assigns), ("_u", "_v"), strict=True)
            pair = [sharded.placed_like(x, attribute(self, site.fqn + suffix)) for x, suffix in vectors]
        for suffix, vector in zip(("_u", "_v"), pair, strict=True):
            for name in names:
                state_dict.pop(name + suffix, None)
            if vector is not None:
                state_dict.update(dict.fromkeys((name + suffix for name in own), vector))

    def __copy__(self) -> "SpectralNormGraphModule":
        return SpectralNormGraphModule(self, self.graph, type(self).__name__)

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
        for name in _REPLACED:
            body.pop(name, None)
        # Not within its own state.
        hooks = self._hooks_of_module()
        others = {k: hook for k, hook in self._load_state_dict_pre_hooks.items() if k not in hooks}
        body["_load_state_dict_pre_hooks"] = OrderedDict(others)
        return _rebuild, (body, imports, type(self).__name__, hooks)


# What a module, parameter or buffer of the model cannot be called.
_OWN_NAMES = {name for kind in SpectralNormGraphModule.__mro__ for name in vars(kind)} | {"meta"}


def _rebuild(
    body: dict[str, Any], imports: str, class_name: str, hooks: Mapping[int, Callable[..., Any]]
) -> SpectralNormGraphModule:
    """Unpickle: GraphModule stores code and traces it again, but drops what the graph does not use."""
    root = nn.Module()
    root.__dict__.update(body)
    graph: Any = reduce_graph_module(body, imports).graph
    gm = SpectralNormGraphModule(root, graph, class_name)
    for key, hook in hooks.items():
        gm._load_state_dict_pre_hooks[key] = _WrappedHook(hook, gm)
    return gm


def _converged(site: Site, loaded: Any, loaded_u: Any, assigns: bool) -> tuple[Tensor, Tensor]:
    if not isinstance(loaded, Tensor) or loaded.shape != site.weight.shape:
        return site.u, site.v  # PyTorch reports the weight
    like = loaded if assigns or site.weight.is_meta else site.weight
    weight = loaded.detach().to(device=like.device, dtype=like.dtype)
    weight_mat = sharded.matrix(weight, site.dim)
    dtype, device = reference.compute_dtype(weight), weight.device
    start = (torch.empty_like(x, dtype=dtype, device=device) for x in (site.u, site.v))
    u, v = reference.random_start(*start)
    order = site.config.order
    if isinstance(loaded_u, Tensor) and loaded_u.shape == u.shape:
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


def is_parameter(module: nn.Module, fqn: str) -> bool:
    """Whether an attribute is a parameter, and not computed from others, as by a parametrization.

    Args:
        module: The module tree.
        fqn: The attribute.
    """
    owner, name = owner_of(module, fqn)
    return name in owner._parameters


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
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for module in modules.values():
        if hasattr(module, "set_reshard_after_backward"):  # FSDP2's; the DDP of replicate has none
            # After a forward without backward the outermost one holds its weights whole, in the dtype of
            # mixed precision. State dicts are of the shards, too.
            module.reshard()
    found = {name: module for name, module in modules.items() if isinstance(module, SpectralNormGraphModule)}
    if not found:
        raise TypeError(
            f"{type(model).__name__} holds no transformed model. specnorm_fx.transform(model) makes one."
        )
    # Of several none is the model itself, as they do not stand in each other.
    return {f"{name}." if len(found) > 1 else "": gm for name, gm in found.items()}


def resolve(model: nn.Module) -> SpectralNormGraphModule:
    """The transformed model that a model is, but for what is wrapped around it.

    Args:
        model: A transformed model, also inside ``torch.compile``, DDP or AveragedModel.

    Raises:
        TypeError: There is none; or it is a part of ``model``.
    """
    transformed(model)
    module = model
    while not isinstance(module, SpectralNormGraphModule):
        names = list(module._modules)
        if len(names) != 1 or names[0] not in _WRAPPED or module._parameters:
            break
        module = module.get_submodule(names[0])
    else:
        return module
    parts = [name for name, part in model.named_modules() if isinstance(part, SpectralNormGraphModule)]
    raise TypeError(
        f"{type(model).__name__} is not transformed as a whole: {', '.join(map(repr, parts))} "
        f"{'is' if len(parts) == 1 else 'are'}. This function works on one transformed model: give it the "
        f"part{'' if len(parts) == 1 else 's, one after the other'}."
    )


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
