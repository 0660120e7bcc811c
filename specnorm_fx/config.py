"""Which weights are normalised, and how: the options of one weight, and selection by pattern."""

import difflib
import fnmatch
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

from torch import nn

__all__ = ["Pattern", "Select", "Selection", "SpectralNormConfig"]

Pattern: TypeAlias = "type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[nn.Module, str], bool]"
Select: TypeAlias = "Pattern | Sequence[Pattern] | Mapping[Pattern, SpectralNormConfig | None] | None"

UPDATES = ("forward", "step")
ORDERS = ("uv", "vu")
IMPLEMENTATIONS = ("auto", "reference")

# How many weights an error message names, of a model that may have hundreds.
LISTED = 20


@dataclass(frozen=True)
class SpectralNormConfig:
    """How one weight is normalised. The defaults are those of torch's own spectral norm.

    Attributes:
        n_power_iterations: Power iterations at every update, at least 1.
        eps: Norms and sigmas up to this count as zero, above 0.
        dim: The output dimension of the weight; ``None`` means 1 for ConvTranspose and 0 otherwise.
        update: ``"forward"``: once in every training forward of the model, as torch does. ``"step"``:
            only in `specnorm_fx.update_`, to be called after ``optimizer.step()``; every forward of a
            step then sees the same weights.
        order: ``"uv"``: u first, then v, as ``torch.nn.utils.parametrizations.spectral_norm``.
            ``"vu"``: as the legacy hook ``torch.nn.utils.spectral_norm``.
        implementation: ``"auto"``: the fastest there is for the device, equal to torch's up to rounding.
            ``"reference"``: torch's operations in torch's order (`specnorm_fx.reference`), bit-identical to
            it on the CPU.

    Raises:
        ValueError: A value is out of its range.
    """

    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int | None = None
    update: str = "forward"
    order: str = "uv"
    implementation: str = "auto"

    def __post_init__(self) -> None:
        n = self.n_power_iterations
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n_power_iterations must be an integer of at least 1, got {n!r}.")
        is_real = isinstance(self.eps, numbers.Real) and not isinstance(self.eps, bool)
        if not is_real or not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be a finite number above 0, got {self.eps!r}. torch uses 1e-12.")
        object.__setattr__(self, "eps", float(self.eps))  # not NumPy's, which writes itself otherwise
        if self.dim is not None and (not isinstance(self.dim, int) or isinstance(self.dim, bool)):
            raise ValueError(f"dim must be an integer or None, got {self.dim!r}.")
        if self.update not in UPDATES:
            raise ValueError(f"update must be one of {UPDATES}, got {self.update!r}.")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}.")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {self.implementation!r}.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "SpectralNormConfig":
        """The configuration for keyword options.

        Args:
            options: Field names and values.

        Raises:
            TypeError: An option is unknown; the message names the nearest one.
            ValueError: A value is out of range.
        """
        names = [field.name for field in fields(cls)]
        for option in options:
            if option not in names:
                raise TypeError(
                    f"unknown option {option!r}.{_did_you_mean(option, names)} "
                    f"The options are {', '.join(names)}."
                )
        return cls(**options)


class Selectable(Protocol):
    """What selection needs to know of a weight (see `specnorm_fx.capture.Weight`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """All FQNs of the parameter."""

    @property
    def modules(self) -> tuple[str, ...]:
        """FQNs of the modules that own it."""

    @property
    def module(self) -> nn.Module:
        """The first of them."""

    @property
    def kind(self) -> type[nn.Module]:
        """The layer type that says how the weight is used."""


@dataclass
class Rule:
    """One pattern with what is to happen to the weights it matches (``None``: leave them alone)."""

    pattern: Pattern
    config: SpectralNormConfig | None

    def matches(self, weight: Selectable) -> bool:
        pattern = self.pattern
        if isinstance(pattern, str):
            candidates = (*weight.modules, *weight.names)
            if pattern.startswith("re:"):
                return any(re.fullmatch(pattern[3:], name) for name in candidates)
            return any(fnmatch.fnmatchcase(name, pattern) for name in candidates)
        if isinstance(pattern, type | tuple):
            return issubclass(weight.kind, pattern)
        return any(pattern(weight.module, name) for name in weight.modules)

    def __str__(self) -> str:
        if isinstance(self.pattern, tuple):
            return f"({', '.join(t.__name__ for t in self.pattern)})"
        return getattr(self.pattern, "__name__", repr(self.pattern))


class Selection:
    """The rules of a ``select`` argument, in order; the first that matches a weight decides.

    A type matches modules of that type; a glob (``"blocks.*"``, where ``*`` crosses dots) or a full
    match of ``"re:..."`` the FQN of the module or of the weight; a callable decides by
    ``(module, fqn)``.

    Args:
        select: As in `specnorm_fx.transform`, but not ``None``.
        default: The configuration where ``select`` names none.

    Raises:
        TypeError: ``select``, or a value of a mapping, is of no supported form.
        ValueError: A regular expression does not compile.
    """

    def __init__(self, select: Select, default: SpectralNormConfig) -> None:
        if isinstance(select, Mapping):
            self.rules = [Rule(_checked(p), _checked_config(p, c)) for p, c in select.items()]
        elif isinstance(select, list) or (isinstance(select, tuple) and not _is_types(select)):
            self.rules = [Rule(_checked(pattern), default) for pattern in select]
        else:
            self.rules = [Rule(_checked(select), default)]

    def rule_for(self, weight: Selectable) -> Rule | None:
        """The first rule that matches the weight, or None.

        Args:
            weight: One of a model.
        """
        return next((rule for rule in self.rules if rule.matches(weight)), None)

    def require_matches(self, weights: Sequence[Selectable]) -> None:
        """See that every rule matches a weight.

        Args:
            weights: All of a model.

        Raises:
            ValueError: One matches none; the message has near names.
        """
        for rule in self.rules:
            if any(rule.matches(weight) for weight in weights):
                continue
            if isinstance(rule.pattern, str):
                names = [name for weight in weights for name in weight.modules]
                hint = _did_you_mean(rule.pattern.removeprefix("re:"), names)
            else:
                hint = ""
            known = [f"{weight.names[0]} ({weight.kind.__name__})" for weight in weights]
            if len(known) > LISTED:
                known[LISTED:] = [f"and {len(known) - LISTED} more"]
            raise ValueError(
                f"select pattern {rule} matches no weight.{hint} "
                f"The weights that can be normalised are: {', '.join(known) or 'none'}."
            )

    def require_reached(self, weights: Sequence[Selectable], hidden: Mapping[str, str]) -> None:
        """See that every rule matches a weight that the graph reaches.

        Args:
            weights: As in `require_matches`.
            hidden: Why, by first name, for each weight to normalise that the graph does not reach.

        Raises:
            ValueError: One does not.
        """
        for rule in self.rules:
            matched = [weight.names[0] for weight in weights if self.rule_for(weight) is rule]
            if matched and hidden.keys() >= set(matched):
                reasons = "; ".join(f"{name} is {hidden[name]}" for name in matched)
                raise ValueError(f"select pattern {rule} matches only weights out of reach: {reasons}.")


def _is_types(parts: Sequence[Any]) -> bool:
    return bool(parts) and all(isinstance(p, type) and issubclass(p, nn.Module) for p in parts)


def _checked(pattern: Any) -> Pattern:
    is_types = _is_types(pattern if isinstance(pattern, tuple) else (pattern,))
    is_callable = callable(pattern) and not isinstance(pattern, type)
    if isinstance(pattern, nn.Module):
        raise TypeError(
            f"select takes names and types, not modules: got a {type(pattern).__name__}. Give its FQN, or "
            f"lambda module, fqn: module is layer."
        )
    if not (is_types or is_callable or isinstance(pattern, str)):
        raise TypeError(
            f"select takes a module type or a tuple of them, a glob or 're:...' string, a callable "
            f"(module, fqn) -> bool, a list of these, or a mapping from them to "
            f"SpectralNormConfig or None; got {pattern!r}."
        )
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"select pattern {pattern!r} does not compile: {error}.") from error
    checked: Pattern = pattern
    return checked


def _checked_config(pattern: Any, config: Any) -> SpectralNormConfig | None:
    if config is not None and not isinstance(config, SpectralNormConfig):
        raise TypeError(
            f"select maps {pattern!r} to {config!r}; it must be a SpectralNormConfig, or None to skip."
        )
    return config


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
