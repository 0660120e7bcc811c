"""u and v moved outside of the forward: `update_` once per step, `warm_up_` until they have converged."""

import torch
from torch import Tensor, nn

from specnorm_fx import ops, reference
from specnorm_fx.graph_module import Site, resolve

__all__ = ["update_", "warm_up_"]


@torch.no_grad()
def update_(model: nn.Module) -> None:
    """Power iterations of the weights with ``update="step"``; call it after ``optimizer.step()``.

    Every forward until the next call then sees the same weights: activation checkpointing,
    micro-batches and D(real) / D(fake) included. Weights with ``update="forward"`` are left alone. In
    eval mode it does the same as in training mode.

    Args:
        model: A transformed model, also inside ``torch.compile`` or DDP.

    Raises:
        TypeError: ``model`` holds no transformed model.
        ValueError: None of its weights has ``update="step"``.
    """
    sites = [site for site in resolve(model).sites() if site.config.update == "step"]
    if not sites:
        raise ValueError(
            "update_ found no weight with update='step': with update='forward' every training forward "
            "iterates by itself. Use transform(model, update='step')."
        )
    auto = [site for site in sites if site.config.implementation == "auto"]
    together = [[auto[i] for i in group] for group in ops.groups([site.weight for site in auto])]
    for group in together:
        _update_together_(group)
    updated = {site.fqn for group in together for site in group}
    for site in sites:
        if site.fqn not in updated:
            config = site.config
            u, v = reference.power_iteration(
                site.matrix(), *site.vectors(), config.n_power_iterations, config.eps, config.order
            )
            site.u.copy_(u)
            site.v.copy_(v)


def _update_together_(sites: list[Site]) -> None:
    configs = [site.config for site in sites]
    old = [site.u for site in sites] + [site.v for site in sites]
    vectors, _ = ops.power_iteration(
        [site.weight.detach() for site in sites],
        old[: len(sites)],
        old[len(sites) :],
        [config.n_power_iterations for config in configs],
        [config.eps for config in configs],
        [config.dim or 0 for config in configs],
        [config.order for config in configs],
    )
    torch._foreach_copy_(old, vectors.split([x.shape[0] for x in old]))


@torch.no_grad()
def warm_up_(model: nn.Module, n: int | None = None, tol: float | None = None) -> None:
    """Let u and v of every weight converge: after an overwrite of the weights, say.

    Loading a checkpoint without u and v does it by itself. u and v that are zero, NaN or inf, as torch's own
    spectral norm can leave them behind, start anew, by the same numbers on every rank. NaN or inf in a weight
    changes nothing.

    Args:
        model: A transformed model, also inside ``torch.compile`` or DDP; in any mode.
        n: Run exactly this many power iterations, without waiting for the device.
        tol: Run until an iteration changes sigma by no more than this, relatively. With neither ``n``
            nor ``tol``: 1e-6; in any case at most 1000 iterations.

    Raises:
        TypeError: ``model`` holds no transformed model.
        ValueError: Both ``n`` and ``tol`` are given, or one is not above 0.
    """
    if n is not None and tol is not None:
        raise ValueError("warm_up_ takes n or tol, not both.")
    for name, value in (("n", n), ("tol", tol)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}.")
    for site in resolve(model).sites():
        config, weight_mat = site.config, site.matrix()
        u, v = (_with_direction(x, config.eps) for x in site.vectors())
        if n is not None:
            u, v = reference.power_iteration(weight_mat, u, v, n, config.eps, config.order)
        else:
            tolerance = reference.CONVERGENCE_TOLERANCE if tol is None else tol
            u, v = reference.converge(weight_mat, u, v, config.eps, config.order, tolerance)
        site.u.copy_(u)
        site.v.copy_(v)


def _with_direction(x: Tensor, eps: float) -> Tensor:
    """The vector, or a random one in place of one that no iteration could move."""
    # Not the global generator: the ranks of DDP draw other numbers from theirs.
    generator = torch.Generator(x.device).manual_seed(0)
    other = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    norm = x.norm(2, dim=0, keepdim=True)
    return torch.where((norm > eps) & norm.isfinite(), x, other / other.norm())
