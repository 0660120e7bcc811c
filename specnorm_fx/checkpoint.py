"""The layouts in which spectral norm stands in a state dict, and conversion between them.

========================  =====================================  ==========================
layout                    the weight                             u and v
========================  =====================================  ==========================
``"specnorm_fx"``         ``conv.weight``                        ``conv.weight_u``, ``_v``
``"parametrizations"``    ``conv.parametrizations.weight``       ``...weight.0._u``,
                          ``.original``                          ``...weight.0._v``
``"hook"``                ``conv.weight_orig``                   ``conv.weight_u``, ``_v``
``"plain"``               ``conv.weight``                        none
========================  =====================================  ==========================

In all four the weight is the stored one, before division by sigma. For the weights after division
see `specnorm_fx.frozen_state_dict`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["LAYOUTS", "Keys", "adapt_", "convert_state_dict", "find_weights", "fqn_of", "keys_of"]

LAYOUTS = ("specnorm_fx", "parametrizations", "hook", "plain")


class Keys(NamedTuple):
    """The state dict keys of one weight, u and v (``None`` where the layout has none)."""

    weight: str
    u: str | None
    v: str | None


def keys_of(fqn: str, layout: str) -> Keys:
    """The keys under which a layout keeps a weight.

    Args:
        fqn: The weight (``"conv.weight"``).
        layout: One of `LAYOUTS`.

    Raises:
        ValueError: The layout is unknown.
    """
    module, _, name = fqn.rpartition(".")
    prefix = f"{module}." if module else ""
    if layout == "parametrizations":
        base = f"{prefix}parametrizations.{name}."
        return Keys(f"{base}original", f"{base}0._u", f"{base}0._v")
    if layout == "hook":
        return Keys(f"{fqn}_orig", f"{fqn}_u", f"{fqn}_v")
    if layout == "specnorm_fx":
        return Keys(fqn, f"{fqn}_u", f"{fqn}_v")
    if layout == "plain":
        return Keys(fqn, None, None)
    raise ValueError(f"to must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}.")


def fqn_of(key: str) -> tuple[str, str]:
    """The inverse of `keys_of` for the weight.

    Args:
        key: Of a weight, in any layout.

    Returns:
        Its FQN, and ``"parametrizations"`` or ``"hook"``; ``"plain"`` where the key is the FQN.
    """
    head, middle, rest = key.rpartition("parametrizations.")
    if middle and rest.endswith(".original"):
        return head + rest.removesuffix(".original"), "parametrizations"
    if key.endswith("_orig"):
        return key.removesuffix("_orig"), "hook"
    return key, "plain"


def convert_state_dict(state_dict: Mapping[str, Any], *, to: str) -> "OrderedDict[str, Any]":
    """The same state under the key names of another layout.

    Pure: neither the mapping nor its tensors are changed, and tensors are shared with the result. Each
    weight is recognised by its own keys, so layouts may be mixed; keys that belong to no spectral norm
    are kept. The order of keys is kept. ``to="plain"`` drops u and v, and still holds the weights
    before division by sigma. In torch's layouts u and v have the dtype of their weight, which torch needs
    after ``load_state_dict(assign=True)``: those of weights in half precision are rounded.

    Args:
        state_dict: From ``state_dict()`` of a transformed model, or of one with torch's spectral norm
            (either API).
        to: ``"specnorm_fx"``, ``"parametrizations"``, ``"hook"`` or ``"plain"``.

    Returns:
        A new dict.

    Raises:
        ValueError: ``to`` is unknown; or it needs u and v, and the state dict holds no spectral norm,
            or a weight of the oldest hook format, which has no v.
    """
    keys_of("", to)
    found = dict(find_weights(state_dict))
    if not found and to != "plain":
        raise ValueError(
            f"The state dict holds no u and v, which the layout {to!r} needs. Load it into a transformed "
            f"model, where they converge anew, and convert that model's state_dict()."
        )
    renamed: dict[str, str | None] = {}
    weight_of: dict[str, Any] = {}  # by its u and v
    for fqn, keys in found.items():
        target = keys_of(fqn, to)
        if keys.v not in state_dict and target.v is not None:
            raise ValueError(
                f"{fqn} has no v in the state dict (the hook's format before torch 1.1). Load it into a "
                f"transformed model, where u and v converge anew, and convert that model's state_dict()."
            )
        if keys.weight != fqn:
            renamed[fqn] = None  # the hook's cached W / sigma of the oldest format
        renamed |= {old: new for old, new in zip(keys, target, strict=True) if old is not None}
        if to in ("parametrizations", "hook"):
            weight_of |= {str(key): state_dict[keys.weight] for key in (keys.u, keys.v)}
    converted: OrderedDict[str, Any] = OrderedDict()
    if hasattr(state_dict, "_metadata"):  # the versions of modules, which Module.state_dict() attaches
        converted._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for key, value in state_dict.items():
        new_key = renamed.get(key, key)
        if new_key is not None:
            weight = weight_of.get(key)
            if isinstance(value, Tensor) and isinstance(weight, Tensor):
                value = value.to(weight.dtype)
            converted[new_key] = value
    return converted


def find_weights(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Keys]]:
    """The weights with spectral norm in a state dict.

    Args:
        state_dict: Any layout; or parameters and buffers by name.

    Yields:
        The FQN, and the keys that the weight, u and v stand under.
    """
    for key in state_dict:
        fqn, layout = fqn_of(key)
        if layout == "plain":
            if not key.endswith("_u") or f"{key.removesuffix('_u')}_orig" in state_dict:
                continue
            fqn, layout = key.removesuffix("_u"), "specnorm_fx"
        keys = keys_of(fqn, layout)
        # The oldest hook format has u alone.
        has_v = keys.v in state_dict or layout == "hook"
        if keys.weight in state_dict and keys.u in state_dict and has_v:
            yield fqn, keys


def adapt_(state_dict: MutableMapping[str, Any], fqn: str) -> tuple[Tensor, Tensor | None] | None:
    """Bring the keys of one weight to the layout ``"specnorm_fx"``, in place.

    Args:
        state_dict: Any layout.
        fqn: The weight, with the prefix it has in the state dict.

    Returns:
        ``None`` if the weight is absent or has both u and v; else the weight and its u, if any: u and v
        must be computed anew.
    """
    target = keys_of(fqn, "specnorm_fx")
    for layout in ("parametrizations", "hook"):
        keys = keys_of(fqn, layout)
        if keys.weight in state_dict:
            for old, new in zip(keys, target, strict=True):
                if old in state_dict:  # the weight over the hook's cached W / sigma of the oldest format
                    state_dict[str(new)] = state_dict.pop(str(old))
            break
    else:
        # u without v is no known format of ours: PyTorch reports the missing key.
        if target.u in state_dict:
            return None
    if fqn not in state_dict or target.v in state_dict:
        return None
    return state_dict[fqn], state_dict.get(str(target.u))
