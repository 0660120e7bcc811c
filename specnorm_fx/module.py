"""SpectralNorm: the leaf module in the graph that normalises all selected weights in one call."""

from collections.abc import Sequence

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
        configs = self.configs
        iterating = [self.training and config.update == "forward" for config in configs]
        counts = [c.n_power_iterations * i for c, i in zip(configs, iterating, strict=True)]
        eps = [float(text) for text in self._eps]
        dims = [config.dim or 0 for config in configs]
        orders = [config.order for config in configs]
        with torch.no_grad():
            stored = [weight.detach() for weight in weights]
            # The graph goes on with these fresh tensors, never with the buffers: two forwards followed
            # by one backward (D(real) - D(fake)) would find saved buffers overwritten.
            new_us, new_vs = ops.singular_vectors(stored, us, vs, counts, eps, dims, orders)
            for u, v, new_u, new_v, iterates in zip(us, vs, new_us, new_vs, iterating, strict=True):
                if iterates:
                    u.copy_(new_u)
                    v.copy_(new_v)
        return [
            reference.normalized(*arguments)
            for arguments in zip(weights, new_us, new_vs, eps, dims, strict=True)
        ]

    def extra_repr(self) -> str:
        """The number of weights and the distinct configurations."""
        distinct = dict.fromkeys(self.configs)
        return "\n".join([f"{len(self.configs)} weights", *map(str, distinct)])
