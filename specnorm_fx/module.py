"""SpectralNorm: the leaf module in the graph that normalises all selected weights in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from specnorm_fx import ops, reference
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
        self._auto = tuple(i for i, config in enumerate(configs) if config.implementation == "auto")

    def forward(self, weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
        """Normalise each weight.

        Args:
            weights: Any shapes of at least two dimensions.
            us: u of each weight, ``[m]``; overwritten where the weight iterates.
            vs: v of each weight, ``[n]``; likewise.

        Returns:
            The normalised weights, each with the shape and dtype of its weight.

        Raises:
            TraceError: It is being traced by ``torch.fx``, which would fix the mode it is in.
        """
        if isinstance(weights[0], fx.Proxy):
            raise TraceError(
                "SpectralNorm follows train() and eval(), which a symbolic trace would fix. A transformed "
                "model is a GraphModule already; to trace it again, use a Tracer whose is_leaf_module is "
                "true for specnorm_fx.module.SpectralNorm."
            )
        normalized: list[Any] = [None] * len(weights)
        for group in ops.groups([weights[i] for i in self._auto]):
            self._normalize_together_([self._auto[i] for i in group], weights, us, vs, normalized)
        others = [i for i, result in enumerate(normalized) if result is None]
        if others:
            self._normalize_by_reference_(others, weights, us, vs, normalized)
        return normalized

    def _normalize_together_(
        self,
        sites: list[int],
        weights: list[Tensor],
        us: list[Tensor],
        vs: list[Tensor],
        normalized: list[Any],
    ) -> None:
        """Sites of one device and dtype, in place in ``normalized``, u and v."""
        counts, eps, dims, orders = self._options(sites)
        stored = [us[i] for i in sites] + [vs[i] for i in sites]
        vectors, _, results = ops.normalize(
            [weights[i] for i in sites],
            stored[: len(sites)],
            stored[len(sites) :],
            counts,
            eps,
            dims,
            orders,
        )
        for i, result in zip(sites, results, strict=True):
            normalized[i] = result
        with torch.no_grad():
            fresh = vectors.split([x.shape[0] for x in stored])
            moved = [k for k, count in enumerate(counts + counts) if count]
            if moved:
                torch._foreach_copy_([stored[k] for k in moved], [fresh[k] for k in moved])

    def _normalize_by_reference_(
        self,
        sites: list[int],
        weights: list[Tensor],
        us: list[Tensor],
        vs: list[Tensor],
        normalized: list[Any],
    ) -> None:
        """Any sites, by torch's operations in torch's order, likewise in place."""
        counts, eps, dims, orders = self._options(sites)
        old_us, old_vs = [us[i] for i in sites], [vs[i] for i in sites]
        with torch.no_grad():
            stored = [weights[i].detach() for i in sites]
            # The graph goes on with these fresh tensors, never with the buffers: two forwards followed
            # by one backward (D(real) - D(fake)) would find saved buffers overwritten.
            new_us, new_vs = ops.singular_vectors(stored, old_us, old_vs, counts, eps, dims, orders)
            for k, count in enumerate(counts):
                if count:
                    old_us[k].copy_(new_us[k])
                    old_vs[k].copy_(new_vs[k])
        for k, i in enumerate(sites):
            normalized[i] = reference.normalized(weights[i], new_us[k], new_vs[k], eps[k], dims[k])

    def _options(self, sites: list[int]) -> tuple[list[int], list[float], list[int], list[str]]:
        """n_power_iterations (0 where none is due), eps, dims and orders, as the operators take them."""
        configs = [self.configs[i] for i in sites]
        due = [self.training and config.update == "forward" for config in configs]
        counts = [c.n_power_iterations if is_due else 0 for c, is_due in zip(configs, due, strict=True)]
        eps = [float(self._eps[i]) for i in sites]
        return counts, eps, [config.dim or 0 for config in configs], [config.order for config in configs]

    def extra_repr(self) -> str:
        """The number of weights and the distinct configurations."""
        distinct = dict.fromkeys(self.configs)
        return "\n".join([f"{len(self.configs)} weights", *map(str, distinct)])
