"""The rewrite: `SpectralNormPass`, and `transform`, which captures a model and runs it."""

import copy
import inspect
import itertools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.parameter import is_lazy

from specnorm_fx import capture, reference, sharded
from specnorm_fx.adopt import TorchSN, find_exported_sn, find_torch_sn, read_stripped_
from specnorm_fx.capture import DEFAULT_KINDS, TRANSPOSED, Weight
from specnorm_fx.config import Select, Selectable, Selection, SpectralNormConfig
from specnorm_fx.exported import fixed_layers, tidy_
from specnorm_fx.graph_module import SpectralNormGraphModule, attribute, owner_of, spectral_norm_node
from specnorm_fx.module import SpectralNorm

__all__ = ["SpectralNormPass", "transform"]

logger = logging.getLogger(__name__)


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    select: Select = None,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    update: str = "forward",
    order: str = "uv",
    implementation: str = "auto",
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    **unknown: Any,
) -> SpectralNormGraphModule:
    """Normalise weights of a model by their spectral norm, in a graph.

    The result shares the parameters and buffers of ``model`` (an optimizer built before stays valid)
    and has the same names, with ``weight_u`` and ``weight_v`` beside each normalised ``weight``.
    ``model`` itself is left as it is. Call it before ``torch.compile`` and before DDP.

    Equivalent to ``torch.nn.utils.parametrizations.spectral_norm`` on each selected layer (same start
    for the same seed; with ``implementation="reference"`` bit-identical on the CPU). It differs in that
    every weight iterates once per training forward of the model, however often it is used, and that a
    tied weight is normalised for all its users; see `specnorm_fx.reference` for tiny and half-precision
    weights.

    Args:
        model: A model that ``torch.fx.symbolic_trace`` can follow, or any model with ``example_inputs``;
            a ``fx.GraphModule``; an ``ExportedProgram`` or its ``.module()``, decomposed or not. A model
            that carries torch's spectral norm, either API, continues with its u, v and options. Programs do
            not know their mode: what they become starts in training mode.
        select: What to normalise: a module type or a tuple of types; a glob on the FQN of a module or
            weight (``"blocks.*"``) or ``"re:..."``; a callable ``(module, fqn) -> bool``, given
            the modules of ``model``; a list of these; or a mapping from these to `SpectralNormConfig` or
            ``None`` (skip), of which the first match wins (and which replaces the options of torch's
            spectral norm, too). ``None``: the weights that already carry spectral norm, if there are any;
            otherwise every Linear, Conv and ConvTranspose.
        n_power_iterations: This and the others are the defaults of `SpectralNormConfig`.
        eps: As there.
        dim: As there.
        update: As there.
        order: As there.
        implementation: As there.
        example_inputs: Given, ``torch.export`` makes the graph from them: one tensor, a tuple of positional
            arguments or a dict of keyword arguments. It follows control flow that symbolic trace cannot,
            and fixes more: the graph takes these arguments and no others, of these shapes (an
            ``AssertionError`` otherwise) but for ``dynamic_shapes``, and dropout and batch norm stay in the
            mode of ``model``, so that ``train()`` or ``eval()`` raises if it would have to change them.
        dynamic_shapes: As in ``torch.export.export``: which dimensions of the inputs are free.
        **unknown: Anything else is refused.

    Returns:
        The transformed model. A model on which nothing is left to do comes back as it is.

    Raises:
        TypeError: An unknown option, a ``select`` of no supported form, a model of no supported kind, or
            ``example_inputs`` that the forward does not take.
        ValueError: A pattern that matches nothing, nothing to normalise, an option out of range, a weight
            that cannot be normalised (lazy, meta, quantized, sparse, NaN or inf, read as ``weight.data``),
            ``example_inputs`` for a model that is a graph already, torch's spectral norm in a program from
            ``torch.export``, or a module with a name that the result has for itself (``sites``).
        IndexError: ``dim`` is out of range for a weight.
        TraceError: Symbolic trace cannot follow the model. What ``torch.export`` raises comes as it is.
    """
    options = {
        "n_power_iterations": n_power_iterations,
        "eps": eps,
        "dim": dim,
        "update": update,
        "order": order,
        "implementation": implementation,
    }
    rewrite = SpectralNormPass(select, **options, **unknown)
    trace = capture.symbolic_trace
    if example_inputs is not None:
        trace = partial(capture.export_trace, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    _check_capture(model, example_inputs, dynamic_shapes)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    _check_supported(model)
    transformed: SpectralNormGraphModule = rewrite.rewrite(model, trace).graph_module
    return transformed


class SpectralNormPass(PassBase):
    """The rewrite as a pass for ``torch.fx.passes.infra.pass_manager.PassManager``.

    1. A selected layer called as a module is opened into its operations.
    2. All ``get_attr`` nodes of a selected weight give way to one, at the head of the graph, which runs
       with u and v through the one ``call_module`` of a `SpectralNorm`; its outputs take their place.
    3. u and v become the buffers ``<weight>_u`` and ``<weight>_v`` beside the weight.
    4. A weight that torch's spectral norm already normalises is taken over with u, v and options; one
       that this pass has normalised before is left alone, with a log message if other options are given.
    5. All else stays: nodes, their order and ``meta``.

    The pass does not modify its input: go on with ``PassResult.graph_module``. ``modified`` is False,
    and the module the one that came in, when every selected weight was normalised before.

    Order: before passes that fuse or fold weights (conv + batch norm fusion, quantization), or sigma is
    taken of what they have folded. After passes that return a new ``fx.GraphModule`` (torch's ``CSEPass``):
    it computes the same, but `sigmas`, `update_` and `freeze` do not know it.
    ``this_before_that_pass_constraint`` states both.

    Args:
        select: As in `transform`.
        **options: As in `transform`.

    Raises:
        TypeError: See `transform`.
        ValueError: See `transform`.
    """

    def __init__(self, select: Select = None, **options: Any) -> None:
        self.default = SpectralNormConfig.from_options(options)
        # Checked now, so that a malformed pattern is reported where it was written.
        self.selection = None if select is None else Selection(select, self.default)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass; see the class.

        Args:
            graph_module: Any GraphModule; it is not changed.

        Returns:
            The result, and whether it is another module than ``graph_module``.

        Raises:
            TypeError: See `transform`.
            ValueError: See `transform`.
            IndexError: See `transform`.
        """
        return self.rewrite(graph_module)

    def rewrite(
        self, model: nn.Module, trace: Callable[[nn.Module], fx.Graph] = capture.symbolic_trace
    ) -> PassResult:
        """As `call`, for a model that has not been traced yet as well.

        Args:
            model: Any module; it is not changed.
            trace: Makes the graph of one that has none.

        Returns:
            As `call`.

        Raises:
            TypeError: See `transform`.
            ValueError: See `transform`.
            IndexError: See `transform`.
            TraceError: See `transform`.
        """
        # 1. A copy of the structure that shares the tensors: whatever fails below, `model` is whole.
        root = capture.share(model)
        _log_lost_methods(model)

        # 2. Torch's own spectral norm on selected weights is taken off the copy.
        carried = find_torch_sn(model)
        adopted = self._adopt_(root, carried)

        # 3. The graph, and the weights that it uses.
        self._refuse_exported(root)
        graph: Any
        if isinstance(root, fx.GraphModule):
            graph = root.graph
            tidy_(graph, root)
            read_stripped_(graph, adopted.values())
        else:
            with torch.enable_grad():  # as training runs it, so that a region without gradients shows
                graph = trace(root)
            _refuse_unstripped(root, adopted)
        weights = capture.find_weights(root, graph)
        fqns = {id(module): fqn for fqn, module in root.named_modules()}
        for weight in weights:  # a callable may ask which of the user's modules it is
            weight.module = model.get_submodule(fqns[id(weight.module)])
        if self.selection is not None:
            left = (sn for fqn, sn in carried.items() if fqn not in adopted)
            self.selection.require_matches([*weights, *left])

        # 4. Those to normalise that are not normalised yet.
        done = _normalized(root)
        self._log_kept_options(weights, done)
        chosen = self._choose(weights, done, adopted, root, graph)
        if not chosen:
            logger.info("every selected weight is normalised already: nothing to do")
            return PassResult(model, False)

        # 5. The new module, the chosen layers opened, u and v in place.
        for weight, _ in chosen:
            for node in weight.nodes:
                if node.op == "call_module":
                    capture.inline(node, root)
        gm = SpectralNormGraphModule(root, graph, type(model).__name__)
        for weight, config in chosen:
            _register_vectors_(gm, weight, config, _theirs(weight, adopted))

        # 6. Every use of each weight goes through the one call.
        route_(gm, [(weight.fqn, config) for weight, config in chosen])
        for mode, where in ((True, "training"), (False, "eval")):
            fixed = fixed_layers(graph, mode)
            if fixed:
                logger.warning("torch.export has fixed these layers in %s mode: %s", where, ", ".join(fixed))
        return PassResult(gm, True)

    def _adopt_(self, root: nn.Module, carried: dict[str, TorchSN]) -> dict[str, TorchSN]:
        """Strip the selected weights of torch's spectral norm; what they carried, by FQN.

        ``carried`` is the same of the user's own modules, which a callable is given.
        """
        found = find_torch_sn(root)
        if self.selection is not None:
            found = {fqn: sn for fqn, sn in found.items() if self._rule_config(carried[fqn]) is not None}
        for sn in found.values():
            sn.strip_()
        return found

    def _refuse_exported(self, root: nn.Module) -> None:
        exported = find_exported_sn(root)
        if exported and self.selection is None:
            raise ValueError(
                f"{', '.join(exported)} carries spectral norm that torch.export has spread out into "
                f"operations, so that it cannot be taken over: transform the model itself, "
                f"transform(model, example_inputs=...). Or select what is to be normalised beside it."
            )

    def _rule_config(self, weight: Selectable) -> SpectralNormConfig | None:
        rule = self.selection.rule_for(weight) if self.selection is not None else None
        return rule.config if rule is not None else None

    def _log_kept_options(self, weights: list[Weight], done: Mapping[str, SpectralNormConfig]) -> None:
        """Whoever asks for other options for a weight that is normalised already does not get them."""
        kept = []
        for weight in weights:
            config = self.default if self.selection is None else self._rule_config(weight)
            if config is None or weight.fqn not in done:
                continue
            given = [x.name for x in fields(config) if getattr(config, x.name) != x.default]
            asked, has = _resolved(weight, config), done[weight.fqn]
            if any(getattr(asked, name) != getattr(has, name) for name in given):
                kept.append(weight.fqn)
        if kept:
            logger.warning(
                "%s keep their options, as they are normalised already: for others transform the original "
                "model",
                ", ".join(kept),
            )

    def _choose(
        self,
        weights: list[Weight],
        done: Mapping[str, SpectralNormConfig],
        adopted: dict[str, TorchSN],
        root: nn.Module,
        graph: fx.Graph,
    ) -> list[tuple[Weight, SpectralNormConfig]]:
        """The weights to normalise now, with resolved options."""
        if self.selection is not None:
            wanted = [(w, config) for w in weights if (config := self._rule_config(w)) is not None]
        elif done or adopted:
            wanted = [(w, self.default) for w in weights if adopted.keys() & w.names]
        else:
            wanted = [(w, self.default) for w in weights if issubclass(w.kind, DEFAULT_KINDS)]

        hidden = {w.fqn: capture.obstacle(w, root, graph) for w, _ in wanted if not w.nodes}
        computed = capture.computed_weights(root) if self.selection is None and not (done or adopted) else {}
        _refuse_hidden(adopted, weights, hidden)
        if self.selection is not None:
            self.selection.require_reached(weights, hidden)
        if not done and len(hidden) == len(wanted):
            skipped = "".join(f"\n    {fqn}: {why}" for fqn, why in (hidden | computed).items())
            raise ValueError(
                f"{type(root).__name__} has no weight to normalise. By default these are the weights of "
                f"Linear, Conv and ConvTranspose layers; select others by pattern.{skipped}"
            )
        for fqn, why in (hidden | computed).items():
            logger.warning("%s is not normalised: %s", fqn, why)

        chosen = []
        for weight, config in wanted:
            if weight.fqn in done or weight.fqn in hidden:
                continue
            _check_weight(weight)
            capture.refuse_opaque_users(weight, root, graph)
            theirs = _theirs(weight, adopted)
            if theirs is not None and config is self.default:
                config = replace(
                    theirs.config, update=self.default.update, implementation=self.default.implementation
                )
            chosen.append((weight, _resolved(weight, config)))
        return chosen


def route_(gm: SpectralNormGraphModule, weights: Sequence[tuple[str, SpectralNormConfig]]) -> None:
    """Run weights, beside those that already do, through the one `SpectralNorm` call, in place.

    Args:
        gm: Its graph reads the weights by ``get_attr``; u and v are registered.
        weights: FQN and options of each.
    """
    weights = [*((site.fqn, site.config) for site in gm.sites()), *weights]
    unroute_(gm)
    graph = gm.graph
    readers: dict[int, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        readers.setdefault(id(attribute(gm, node.target)), []).append(node)

    name = _free_name(gm, "spectral_norm")
    gm.add_module(name, SpectralNorm([config for _, config in weights]))
    # Like any new module it starts in training mode; it follows the model from here on.
    gm.get_submodule(name).train(gm.training)

    # The weights' own nodes move to the head of the graph, so that all run through one call.
    stored = []
    for fqn, _ in weights:
        first, *others = readers[id(attribute(gm, fqn))]
        for other in others:
            other.replace_all_uses_with(first)
            graph.erase_node(other)
        first.target = fqn  # a tied weight goes by its first name, beside which u and v stand
        stored.append(first)
    first_operation = next(n for n in graph.nodes if n.op != "placeholder" and n not in stored)
    with graph.inserting_before(first_operation):
        for node in stored:
            first_operation.prepend(node)
        us = [graph.get_attr(f"{fqn}_u") for fqn, _ in weights]
        vs = [graph.get_attr(f"{fqn}_v") for fqn, _ in weights]
        call = graph.call_module(name, (stored, us, vs))
        for index, node in enumerate(stored):
            normalized = graph.create_node(
                "call_function", operator.getitem, (call, index), name=f"{node.name}_sn"
            )
            normalized.meta = copy.copy(node.meta)
            node.replace_all_uses_with(normalized, delete_user_cb=lambda user: user is not call)
    for fqn, config in weights:
        logger.info("%s is normalised by its spectral norm: %s", fqn, config)
    graph.lint()
    gm.recompile()


def unroute_(gm: SpectralNormGraphModule) -> None:
    """Take the `SpectralNorm` call out of the graph: users read the weights themselves, in place."""
    call = spectral_norm_node(gm)
    if call is None:
        return
    weights, us, vs = call.args
    for item in list(call.users):
        item.replace_all_uses_with(weights[item.args[1]])
        gm.graph.erase_node(item)
    gm.graph.erase_node(call)
    for node in (*us, *vs):
        gm.graph.erase_node(node)
    gm.delete_submodule(str(call.target))
    gm.graph.lint()
    gm.recompile()


def _register_vectors_(
    gm: nn.Module, weight: Weight, config: SpectralNormConfig, adopted: TorchSN | None
) -> None:
    parameter = weight.parameter.detach()
    owner, name = owner_of(gm, weight.fqn)
    if adopted is None:
        first_update = config.n_power_iterations if owner.training else 0
        u, v = reference.initial_vectors(
            parameter,
            config.dim or 0,
            config.eps,
            reference.INITIAL_ITERATIONS + first_update,
        )
    else:
        dtype = reference.compute_dtype(parameter)
        u, v = (x.detach().to(dtype, copy=True) for x in (adopted.u, adopted.v))
        m, n = reference.weight_matrix(parameter, config.dim or 0).shape
        if (u.shape, v.shape) != ((m,), (n,)):
            raise ValueError(
                f"{weight.fqn!r} carries u and v of {len(u)} and {len(v)} elements, and dim={config.dim} "
                f"needs {m} and {n}. Leave dim as it was."
            )
    for suffix, vector in (("_u", u), ("_v", v)):
        if hasattr(owner, name + suffix):
            raise ValueError(
                f"{weight.fqn + suffix!r} is to hold a singular vector, and the module has an attribute "
                f"of that name. Rename it."
            )
        owner.register_buffer(name + suffix, vector)


def _theirs(weight: Weight, adopted: Mapping[str, TorchSN]) -> TorchSN | None:
    return next((adopted[name] for name in weight.names if name in adopted), None)


def _normalized(model: nn.Module) -> dict[str, SpectralNormConfig]:
    """What is normalised already: FQN and options."""
    sites = model.sites() if isinstance(model, SpectralNormGraphModule) else ()
    return {site.fqn: site.config for site in sites}


def _log_lost_methods(model: nn.Module) -> None:
    """A graph has no methods of the model; of most that is plain, but PyTorch itself calls these."""
    kind = type(model)
    if isinstance(model, fx.GraphModule) or kind.__module__.startswith("torch."):
        return
    of_module = {name for name, value in vars(nn.Module).items() if inspect.isfunction(value)}
    others = {name for name in of_module if name.startswith("__")} | {"forward", "extra_repr", "_get_name"}
    lost = sorted(x for x in of_module - others if getattr(kind, x) is not getattr(nn.Module, x))
    if lost:
        logger.warning(
            "%s has its own %s, which the transformed model does not have: methods of the model itself stay "
            "behind, those of its parts do not.",
            kind.__name__,
            ", ".join(lost),
        )


def _refuse_hidden(
    adopted: Mapping[str, TorchSN], weights: Sequence[Weight], hidden: Mapping[str, str]
) -> None:
    """Torch's spectral norm was stripped from these, so each must find its place in the graph."""
    known = {name: weight.fqn for weight in weights for name in weight.names}
    for fqn in adopted:
        why = hidden.get(known[fqn]) if fqn in known else "not the weight of a supported layer"
        if why is not None:
            raise ValueError(
                f"{fqn!r} carries torch's spectral norm and cannot be taken over: {why}. Select the "
                f"others by name, select=['...', ...], which leaves torch's own on this one."
            )


def _refuse_unstripped(root: nn.Module, adopted: Mapping[str, TorchSN]) -> None:
    """A function that holds the model itself, not its copy, calls layers that still have torch's."""
    for fqn, sn in adopted.items():
        if any(capture.is_alias(x, vector) for x in root.buffers() for vector in (sn.u, sn.v)):
            raise ValueError(
                f"{fqn!r} carries torch's spectral norm and cannot be taken over: the forward reads it from "
                f"elsewhere than from the model, as a function does that holds the model itself. Write it as "
                f"the forward of a class."
            )


def _resolved(weight: Weight, config: SpectralNormConfig) -> SpectralNormConfig:
    """The configuration with ``dim`` as a position in the weight."""
    ndim = weight.parameter.ndim
    dim = config.dim
    if dim is None:
        dim = 1 if issubclass(weight.kind, TRANSPOSED) else 0
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"dim={dim} is out of range for {weight.fqn!r} ({weight.kind.__name__}) of {ndim} dimensions: "
            f"it must be in [{-ndim}, {ndim - 1}], or None for the layer's output dimension."
        )
    return replace(config, dim=dim % ndim)


def _check_capture(model: Any, example_inputs: Any, dynamic_shapes: Any) -> None:
    """Refuse options of a capture where there is none."""
    if example_inputs is None and dynamic_shapes is not None:
        raise ValueError("dynamic_shapes belongs to example_inputs, which must be given with it.")
    if example_inputs is not None and isinstance(model, fx.GraphModule | torch.export.ExportedProgram):
        raise ValueError(
            f"{type(model).__name__} is a graph already, and example_inputs are for a model that is still to "
            f"be captured: leave them out."
        )


def _check_supported(model: Any) -> None:
    """Refuse what is no plain model or GraphModule, and say what to pass instead."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"transform takes a torch.nn.Module or an ExportedProgram, got {kind}.")
    inner = [fqn for fqn, m in model.named_modules() if fqn and isinstance(m, SpectralNormGraphModule)]
    if inner:
        raise TypeError(
            f"{kind} holds a model that is transformed already, {inner[0]!r}. Transform the whole before its "
            f"parts, or the other parts one by one."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"transform cannot rewrite TorchScript ({kind}): pass the Python module.")
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    # The latter two are torch.compile's and FSDP2's.
    if wrapped or hasattr(model, "_orig_mod") or hasattr(model, "set_requires_gradient_sync"):
        raise TypeError(
            f"transform comes before {kind}: transform the module inside, then wrap the result again."
        )


def _check_weight(weight: Weight) -> None:
    """Refuse a weight that has no spectral norm, or none yet."""
    parameter, layer = weight.parameter, weight.module
    where = f"{weight.fqn!r} ({weight.kind.__name__})"
    leave_out = f"or leave it out with select={{{weight.modules[0]!r}: None, ...}}"
    if is_lazy(parameter):
        raise ValueError(
            f"{where} is lazy and has no shape yet. Run the model once on an example, {leave_out}."
        )
    if sharded.is_sharded(parameter):
        raise ValueError(
            f"{weight.fqn!r} is sharded already. Transform the whole model, then distribute the result: "
            f"fully_shard(transform(model))."
        )
    if parameter.is_meta:
        raise ValueError(
            f"{where} is on the meta device and has no values. Materialise it (to_empty, then load or "
            f"initialise), {leave_out}."
        )
    if parameter.is_quantized or parameter.layout != torch.strided:
        form = "quantized" if parameter.is_quantized else f"sparse ({parameter.layout})"
        raise ValueError(
            f"{where} is {form}, and spectral norm needs a dense weight. Transform before quantization "
            f"or sparsification, {leave_out}."
        )
    if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.element_size() < 2:
        raise ValueError(  # of one byte are those of float8, which have no arithmetic
            f"{where} has dtype {parameter.dtype}, and spectral norm needs a floating or complex one of 16 "
            f"bits or more: convert it, {leave_out}."
        )
    if parameter.ndim < 2 or parameter.numel() == 0:
        raise ValueError(
            f"{where} has shape {list(parameter.shape)}, and spectral norm needs a non-empty matrix or "
            f"more: {leave_out.removeprefix('or ')}."
        )
    if not torch.isfinite(parameter.detach()).all():
        raise ValueError(
            f"{where} contains NaN or inf. Initialise it or load a good checkpoint first, {leave_out}."
        )
    users = (user for node in weight.nodes if node.op == "get_attr" for user in node.users)
    if any(user.target is getattr and user.args[1] == "data" for user in users):
        # In place that would change W / sigma, without autograd's error.
        raise ValueError(
            f"{where} is read as .data in the forward, by which a graph cannot change the stored weight. "
            f"Compute a new tensor, weight * mask, or read weight.detach()."
        )
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        option = "sparse=True" if layer.sparse else "max_norm"
        raise ValueError(
            f"{where} has {option}, which works on the stored weight and not on W / sigma. Build it "
            f"without, {leave_out}."
        )


def _free_name(module: nn.Module, name: str) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(n for n in itertools.chain([name], numbered) if not hasattr(module, n))
