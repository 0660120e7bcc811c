"""From a transformed model to plain weights: W / sigma as constants, nothing of spectral norm left."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from specnorm_fx import sharded
from specnorm_fx.adopt import find_exported_sn, find_torch_sn
from specnorm_fx.graph_module import (
    SpectralNormGraphModule,
    is_parameter,
    owner_of,
    resolve,
)
from specnorm_fx.passes import unroute_

__all__ = ["freeze", "frozen_state_dict", "whole_copy"]


@torch.no_grad()
def freeze(model: nn.Module) -> fx.GraphModule:
    """A copy whose weights are the normalised ones: no u, no v, no `SpectralNorm`, the plain names.

    Its outputs equal those of ``model`` in eval mode bit for bit.

    Args:
        model: A transformed model in eval mode, also inside ``torch.compile``, DDP or FSDP2. It is not
            changed, and the copy shares nothing with it. If it is sharded, all ranks must call this, and
            each gets the whole copy.

    Returns:
        A GraphModule in eval mode; its ``state_dict()`` is `frozen_state_dict`.

    Raises:
        TypeError: ``model`` holds no transformed model, or has one only as a part.
        RuntimeError: It is in training mode, already frozen, or keeps torch's own spectral norm on a weight.
    """
    gm = resolve(model)
    call = gm.call()
    if call is None:
        raise RuntimeError(f"{type(gm).__name__} is frozen already: it has no spectral norm left.")
    spectral_norm, *_ = call
    if gm.training or spectral_norm.training:
        raise RuntimeError(
            f"{type(gm).__name__} is in training mode, where sigma still moves with every forward: call "
            f".eval() before freezing."
        )
    left = [*find_torch_sn(gm), *find_exported_sn(gm)]
    if left:
        raise RuntimeError(
            f"{', '.join(left)} still carries spectral norm, as it was left out of select. Select it, or "
            f"take it off before transform (remove_parametrizations, remove_spectral_norm)."
        )
    for site in gm.sites():
        if not is_parameter(gm, site.fqn):
            raise RuntimeError(
                f"{site.fqn} is no parameter any more but computed from others, which W / sigma cannot take "
                f"the place of. Make it one first: torch.nn.utils.parametrize.remove_parametrizations, say."
            )
    frozen = whole_copy(gm)
    sites = frozen.sites()
    normalized = spectral_norm([x.weight for x in sites], [x.u for x in sites], [x.v for x in sites])

    unroute_(frozen)
    for site, weight in zip(sites, normalized, strict=True):
        # One parameter under all names, so that a tied weight stays tied.
        constant = nn.Parameter(weight, requires_grad=site.weight.requires_grad)
        for fqn in site.names:
            setattr(*owner_of(frozen, fqn), constant)
        for suffix in ("_u", "_v"):
            delattr(*owner_of(frozen, site.fqn + suffix))
    return frozen


def whole_copy(gm: SpectralNormGraphModule) -> SpectralNormGraphModule:
    """A deep copy that is nobody's shard: whole tensors, and nothing that torch.distributed has put on it.

    FSDP2 makes the model's class one that cannot be copied, and leaves hooks on the modules inside. Nor does
    ``deepcopy`` take the weight that a hook (``torch.nn.utils.weight_norm``, ``prune``) has last computed.

    Args:
        gm: A transformed or a frozen model.
    """
    memo: dict[int, Any] = {}
    for module in gm.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                whole = sharded.full(parameter.detach()).clone()
                memo[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = sharded.full(buffer).clone()
        for name, held in vars(module).items():  # hooks, what they compute, and FSDP2's own state
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
            if isinstance(held, OrderedDict) and name not in ("_parameters", "_buffers", "_modules"):
                kept = {key: x for key, x in held.items() if not _is_of_torch_distributed(x)}
                if len(kept) < len(held):
                    memo[id(held)] = OrderedDict(kept)
    root = nn.Module()
    memo[id(gm)] = root  # a graph knows its module
    body = copy.deepcopy(vars(gm), memo)
    root.__dict__.update(body)
    name = next(c.__name__ for c in type(gm).__mro__ if not _is_of_torch_distributed(c))
    whole_copy = SpectralNormGraphModule(root, body["_graph"], name)
    whole_copy.meta = body["meta"]  # as in GraphModule's own deepcopy
    for module in whole_copy.modules():
        for flag in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):  # for Dynamo
            vars(module).pop(flag, None)
    return whole_copy


def _is_of_torch_distributed(x: Any) -> bool:
    """Of a hook, a class or an instance."""
    x = getattr(x, "hook", x)  # torch wraps hooks that take the module
    return str(getattr(x, "__module__", "")).startswith("torch.distributed")


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
