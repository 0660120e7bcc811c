"""From a transformed model to plain weights: W / sigma as constants, nothing of spectral norm left."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from specnorm_fx.adopt import find_torch_sn
from specnorm_fx.graph_module import SpectralNormGraphModule, owner_of, resolve, spectral_norm_node
from specnorm_fx.passes import unroute_

__all__ = ["freeze", "frozen_state_dict"]


@torch.no_grad()
def freeze(model: nn.Module) -> fx.GraphModule:
    """A copy whose weights are the normalised ones: no u, no v, no `SpectralNorm`, the plain names.

    Its outputs equal those of ``model`` in eval mode bit for bit.

    Args:
        model: A transformed model in eval mode, also inside ``torch.compile`` or DDP. It is not changed,
            and the copy shares nothing with it.

    Returns:
        A GraphModule in eval mode; its ``state_dict()`` is `frozen_state_dict`.

    Raises:
        TypeError: ``model`` holds no transformed model.
        RuntimeError: It is in training mode, already frozen, or keeps torch's own spectral norm on a weight.
    """
    gm = resolve(model)
    call = spectral_norm_node(gm)
    if call is None:
        raise RuntimeError(f"{type(gm).__name__} is frozen already: it has no spectral norm left.")
    spectral_norm = gm.get_submodule(str(call.target))
    if gm.training or spectral_norm.training:
        raise RuntimeError(
            f"{type(gm).__name__} is in training mode, where sigma still moves with every forward: call "
            f".eval() before freezing."
        )
    left = find_torch_sn(gm)
    if left:
        raise RuntimeError(
            f"{', '.join(left)} still carries torch's spectral norm, as it was left out of select. Select "
            f"it, or take it off before transform (remove_parametrizations, remove_spectral_norm)."
        )
    sites = gm.sites()
    columns = ([getattr(site, name) for site in sites] for name in ("weight", "u", "v"))
    normalized = spectral_norm(*columns)

    frozen: SpectralNormGraphModule = copy.deepcopy(gm)
    unroute_(frozen)
    for site, weight in zip(sites, normalized, strict=True):
        # One parameter under all names, so that a tied weight stays tied.
        constant = nn.Parameter(weight, requires_grad=site.weight.requires_grad)
        for fqn in site.names:
            setattr(*owner_of(frozen, fqn), constant)
        for suffix in ("_u", "_v"):
            delattr(*owner_of(frozen, site.fqn + suffix))
    return frozen


def frozen_state_dict(model: nn.Module) -> "OrderedDict[str, Any]":
    """The state dict of the frozen model: the original architecture loads it strictly.

    Args:
        model: As in `freeze`.

    Returns:
        The keys of the model before `transform`; weights are W / sigma. It shares nothing with ``model``.

    Raises:
        TypeError: As `freeze`.
        RuntimeError: As `freeze`.
    """
    return OrderedDict(freeze(model).state_dict())
