"""SpectralNorm: the leaf module in the graph that normalises all selected weights in one call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo
from torch.fx.proxy import TraceError

from specnorm_fx import ops, reference, sharded
from specnorm_fx.config import SpectralNormConfig

__all__ = ["SpectralNorm"]


class SpectralNorm(nn.Module):
    """``([W...], [u...], [v...]) -> [W / sigma(W)...]``, iterating in training mode as BatchNorm counts.

    1. In training mode the weights with ``update="forward"`` take ``n_power_iterations`` power
       iterations, once per call, and their u and v buffers are overwritten.
    2. In eval mode, and always with ``update="step"``, u and v are only read.
    3. The gradient flows through sigma, with u and v constant.

    It owns the configurations, not the weights: those, and u and v, stand beside each other in the
    modules they belong to and reach this module through the graph.

    Args:
        configs: One per weight, in the order of the lists; ``dim`` resolved to ``0 <= dim < ndim``.
    """

    def __init__(self, configs: Sequence[SpectralNormConfig]) -> None:
        super().__init__()
        self.configs = tuple(configs)
        # As text, which Dynamo takes for a constant: a float attribute becomes an input of the graph under
        # dynamic=True, and then costs a second analysis (torch 2.13).
        self._eps = tuple(repr(config.eps) for config in configs)
        self._auto = frozenset(i for i, config in enumerate(configs) if config.implementation == "auto")

    @property
    def _is_impure(self) -> bool:
        """What passes of torch.fx ask before they drop a call as unused or compute it once for all."""
        return any(self._iterates())

    def forward(self, weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
        """Normalise each weight.

        Args:
            weights: Any shapes of at least two dimensions.
            us: u of each weight, ``[m]``; overwritten where the weight iterates.
            vs: v of each weight, ``[n]``; likewise. A sharded weight (``DTensor``) has them whole.

        Returns:
            The normalised weights, each with the shape and dtype of its weight.

        Raises:
            TraceError: It is being traced by ``torch.fx``, which would fix the mode it is in.
            RuntimeError: Likewise by ``torch.jit.trace``.
        """
        if isinstance(weights[0], fx.Proxy):
            raise TraceError(
                "SpectralNorm follows train() and eval(), which a symbolic trace would fix. A transformed "
                "model is a GraphModule already; to trace it again, use a Tracer whose is_leaf_module is "
                "true for specnorm_fx.module.SpectralNorm."
            )
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace would fix whether spectral norm iterates, and does not know its operators. "
                "Trace the frozen model, specnorm_fx.freeze(model.eval())."
            )
        iterates = self._iterates()
        normalized: list[Any] = [None] * len(weights)
        for way, sites in self._ways(weights, range(len(weights))):
            columns = _columns(sites, weights, us, vs)
            options = self._options(sites, iterates)
            *vectors, results = way.normalize(*columns, *options)
            for i, result in zip(sites, results, strict=True):
                normalized[i] = result
            _store_(columns[1:], vectors, options[0])
        return normalized

    @torch.no_grad()
    def update_(self, weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> None:
        """Power iterations of the weights with ``update="step"``, in any mode.

        Args:
            weights: As in `forward`.
            us: As there; overwritten where the weight iterates.
            vs: Likewise.
        """
        iterates = [config.update == "step" for config in self.configs]
        due = [i for i, is_due in enumerate(iterates) if is_due]
        for way, sites in self._ways(weights, due):
            columns = _columns(sites, weights, us, vs)
            options = self._options(sites, iterates)
            detached = [weight.detach() for weight in columns[0]]
            _store_(columns[1:], way.iterate(detached, *columns[1:], *options), options[0])

    def _ways(self, weights: list[Tensor], sites: Sequence[int]) -> list[tuple["_Way", list[int]]]:
        """The sites by how they are computed, as many together as one call takes."""
        spread = [i for i in sites if sharded.is_sharded(weights[i])]
        auto = [i for i in sites if i in self._auto and i not in spread]
        ways = [(_BY_OPERATOR, [auto[k] for k in group]) for group in ops.groups([weights[i] for i in auto])]
        taken = {i for _, group in (*ways, (_SHARDED, spread)) for i in group}
        others = [i for i in sites if i not in taken]
        return [*ways, *((way, group) for way, group in ((_REFERENCE, others), (_SHARDED, spread)) if group)]

    def _iterates(self) -> list[bool]:
        """Whether a forward moves u and v of each weight."""
        return [self.training and config.update == "forward" for config in self.configs]

    def _options(
        self, sites: list[int], iterates: list[bool]
    ) -> tuple[list[int], list[float], list[int], list[str]]:
        """n_power_iterations (0 where none is due), eps, dims and orders, as the operators take them."""
        configs = [self.configs[i] for i in sites]
        counts = [self.configs[i].n_power_iterations if iterates[i] else 0 for i in sites]
        eps = [float(self._eps[i]) for i in sites]
        return counts, eps, [config.dim or 0 for config in configs], [config.order for config in configs]

    def extra_repr(self) -> str:
        """The number of weights and the distinct configurations."""
        distinct = dict.fromkeys(self.configs)
        return "\n".join([f"{len(self.configs)} weights", *map(str, distinct)])


def _columns(
    sites: list[int], weights: list[Tensor], us: list[Tensor], vs: list[Tensor]
) -> list[list[Tensor]]:
    """The weights, u and v of some sites."""
    vectors = ([sharded.local(column[i]) for i in sites] for column in (us, vs))
    return [[weights[i] for i in sites], *vectors]


def _store_(buffers: Sequence[list[Tensor]], vectors: Sequence[list[Tensor]], counts: list[int]) -> None:
    """Overwrite u and v of the weights that iterate.

    The graph goes on with the fresh tensors, never with the buffers: two forwards followed by one
    backward (D(real) - D(fake)) would find saved buffers overwritten.

    None of them has a gradient. A no_grad would say so once more, but torch.export makes a region of it that
    gives nothing, and torch.export.load refuses such a region (torch 2.13).
    """
    if not any(counts):
        return
    stored, fresh = [*buffers[0], *buffers[1]], [*vectors[0], *vectors[1]]
    if not all(counts):
        moved = [k for k, count in enumerate(counts + counts) if count]
        stored, fresh = [stored[k] for k in moved], [fresh[k] for k in moved]
    # Plain copies in a program, which others read (in torch 2.11 any compile counts as one), and for
    # torch.func.functionalize, which refuses operators that change their arguments.
    is_eager = not torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or (is_eager and ops.is_functionalized()):
        torch._foreach_copy_(stored, fresh)
    else:
        ops.store_(stored, fresh)


# --- How sites are computed. Each takes (weights, us, vs, n, eps, dims, orders). ---


class _Way(NamedTuple):
    """``normalize`` gives new u, new v and the normalised weights; ``iterate`` u and v alone."""

    normalize: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]]
    iterate: Callable[..., tuple[list[Tensor], list[Tensor]]]


def _normalize_by_operator(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    vectors, _, normalized = ops.normalize(weights, us, vs, *options, True)
    return *ops.split(vectors, weights, options[2]), normalized


def _iterate_by_operator(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    vectors, _ = ops.power_iteration(weights, us, vs, *options)
    return ops.split(vectors, weights, options[2])


def _normalize_by_reference(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """By torch's operations in torch's order."""
    _, eps, dims, _ = options
    with torch.no_grad():
        stored = [weight.detach() for weight in weights]
        new_us, new_vs = _iterate_by_reference(stored, us, vs, *options, True)
    sites = zip(weights, new_us, new_vs, eps, dims, strict=True)
    return new_us, new_vs, [reference.normalized(*site) for site in sites]


def _iterate_by_reference(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    vectors = ops.singular_vectors(weights, us, vs, *options)
    return vectors[: len(us)], vectors[len(us) :]


# Dynamo does not follow shards and collectives: the graph breaks here. (torch.compiler.disable would load
# Dynamo with this package, which takes as long as torch itself.)
@_disable_dynamo
def _normalize_sharded(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n, eps, dims, _ = options
    ops.refuse_recompute(n, True)
    new_us, new_vs = _iterate_sharded([weight.detach() for weight in weights], us, vs, *options)
    sites = zip(weights, new_us, new_vs, eps, dims, strict=True)
    return new_us, new_vs, [sharded.normalized(*site) for site in sites]


@_disable_dynamo
def _iterate_sharded(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    n, eps, dims, orders = options
    matrices = [sharded.matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    return sharded.power_iteration(matrices, us, vs, n, eps, orders)


_BY_OPERATOR = _Way(_normalize_by_operator, _iterate_by_operator)
_REFERENCE = _Way(_normalize_by_reference, _iterate_by_reference)
_SHARDED = _Way(_normalize_sharded, _iterate_sharded)
