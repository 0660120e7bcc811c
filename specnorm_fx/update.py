"""u and v moved outside of the forward: `update_` once per step, `warm_up_` until they have converged."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specnorm_fx import reference
from specnorm_fx.graph_module import sites_of, transformed
from specnorm_fx.module import SpectralNorm

__all__ = ["update_", "update_after", "warm_up_"]


def update_(model: nn.Module) -> None:
    """Power iterations of the weights with ``update="step"``; call it after ``optimizer.step()``.

    Every forward until the next call then sees the same weights: activation checkpointing,
    micro-batches and D(real) / D(fake) included. Weights with ``update="forward"`` are left alone. In
    eval mode it does the same as in training mode. One operator call for all weights; it compiles, alone
    or as a part of a step.

    Of sharded weights (FSDP2, tensor parallel) every rank multiplies what it holds, and vectors are
    added up over the ranks; so there all ranks must call it.

    Args:
        model: A transformed model, also inside ``torch.compile`` or DDP, or a parent of several.

    Raises:
        TypeError: ``model`` holds no transformed model.
        ValueError: None of its weights has ``update="step"``.
    """
    for spectral_norm, *columns in _calls(model):
        spectral_norm.update_(*columns)


def update_after(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Have every ``optimizer.step()`` end with ``update_(model)``.

    A step that ``GradScaler`` skips moves nothing, neither weights nor u and v. A copy of an optimizer, by
    ``deepcopy`` or ``pickle``, has no hooks (so PyTorch): register the copy's anew.

    Args:
        optimizer: Any of ``torch.optim``, of the weights of ``model``. It is its own ``step`` that counts: of
            one that is driven by other methods (SAM's ``second_step``) give the optimizer inside.
        model: As in `update_`.

    Returns:
        A handle, whose ``remove()`` ends it.

    Raises:
        TypeError: As `update_`, at once. Or the optimizer wraps another, and takes no hooks.
        ValueError: As `update_`, at once. Or the optimizer has no parameter of ``model``: it is another
            model's, the generator's say, and u and v would not follow the weights.
    """
    _calls(model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"This {type(optimizer).__name__} has no parameter of the model, so u and v would not follow its "
            f"weights: give update_after the optimizer that trains the model. Where that has copies of the "
            f"parameters, call specnorm_fx.update_(model) after its step."
        )

    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} is a wrapper without hooks of its own: give update_after the "
            f"optimizer inside it, or call specnorm_fx.update_(model) after its step."
        )

    def update_weights(*_: object) -> None:
        update_(model)

    return optimizer.register_step_post_hook(update_weights)


def _calls(model: nn.Module) -> list[tuple[SpectralNorm, list[Tensor], list[Tensor], list[Tensor]]]:
    """The calls of `SpectralNorm` in a model, of which one iterates in `update_`."""
    found = [gm.call() for gm in transformed(model).values()]
    calls = [call for call in found if call is not None]
    if not any(config.update == "step" for spectral_norm, *_ in calls for config in spectral_norm.configs):
        raise ValueError(
            "update_ found no weight with update='step': with update='forward' every training forward "
            "iterates by itself. Use transform(model, update='step')."
        )
    return calls


@torch.no_grad()
def warm_up_(model: nn.Module, n: int | None = None, tol: float | None = None) -> None:
    """Let u and v of every weight converge: after an overwrite of the weights, say.

    Loading a checkpoint without u and v does it by itself. But for ``n`` it starts anew, so it finds the
    largest singular value also where u and v rest at another one. Where the largest two are closer than
    0.2 % it may stop between them. u and v that have no direction (zero, as opposite vectors average to; NaN
    or inf, as torch's own spectral norm can leave them) start anew in any case, by the same numbers on every
    rank. A weight with NaN or inf leaves the others as they are.

    Args:
        model: As in `update_`; in any mode. All ranks must call it if its weights are sharded.
        n: Run exactly this many power iterations from where u and v are, without waiting for the device.
        tol: Run until an iteration changes sigma by no more than this, relatively. With neither ``n``
            nor ``tol``: 1.2e-7, as far as fp32 goes; in any case at most 1000 iterations.

    Raises:
        TypeError: ``model`` holds no transformed model.
        ValueError: Both ``n`` and ``tol`` are given, or one is not above 0.
    """
    if n is not None and tol is not None:
        raise ValueError("warm_up_ takes n or tol, not both.")
    for name, value in (("n", n), ("tol", tol)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}.")
    for site in sites_of(model).values():
        config, weight_mat = site.config, site.matrix()
        anew = reference.random_start(*site.vectors())
        u, v = (_directed(x, other, config.eps) for x, other in zip(site.vectors(), anew, strict=True))
        if n is not None:
            u, v = reference.power_iteration(weight_mat, u, v, n, config.eps, config.order)
        else:
            tolerance = reference.CONVERGENCE_TOLERANCE if tol is None else tol
            new_u, new_v = reference.converge(weight_mat, *anew, config.eps, config.order, tolerance)
            finite = reference.sigma(weight_mat, new_u, new_v).isfinite()
            u, v = torch.where(finite, new_u, u), torch.where(finite, new_v, v)
        site.u.copy_(u)
        site.v.copy_(v)


def _directed(x: Tensor, other: Tensor, eps: float) -> Tensor:
    """The vector, or another in place of one that no iteration could move."""
    norm = x.norm(2, dim=0, keepdim=True)
    return torch.where((norm > eps) & norm.isfinite(), x, other)
