"""Spectral norm that torch has already put on a model, both APIs: found, and taken over as ours.

``torch.nn.utils.parametrizations.spectral_norm`` and the legacy hook ``torch.nn.utils.spectral_norm``
keep u, v and their options in different places. `find_torch_sn` reads them, and `TorchSN.strip_` gives the
module its plain ``weight`` back, so that the rest of the library sees only plain models.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _Parametrization
from torch.nn.utils.spectral_norm import SpectralNorm as _Hook

from specnorm_fx import checkpoint
from specnorm_fx.config import SpectralNormConfig
from specnorm_fx.graph_module import SpectralNormGraphModule

__all__ = ["TorchSN", "find_exported_sn", "find_torch_sn", "read_stripped_"]


@dataclass(frozen=True)
class TorchSN:
    """One weight that carries torch's spectral norm.

    Attributes:
        module_fqn: The module it is on.
        module: That module.
        name: The weight's name there, without spectral norm (``"weight"``).
        config: Its options.
        u: Its left vector ``[m]``, torch's own buffer.
        v: Its right vector ``[n]``, likewise.
    """

    module_fqn: str
    module: nn.Module
    name: str
    config: SpectralNormConfig
    u: Tensor
    v: Tensor

    @property
    def fqn(self) -> str:
        """What the parameter is called without spectral norm."""
        return f"{self.module_fqn}.{self.name}" if self.module_fqn else self.name

    @property
    def stored(self) -> list[Tensor]:
        """The weight before division by sigma; where that is computed, all that it may be computed from."""
        steps = _parametrizations(self.module).get(self.name)
        if steps is not None:
            return [*steps.parameters(), *steps.buffers()]
        stored = self.module._parameters.get(f"{self.name}_orig")
        return [] if stored is None else [stored]

    @property
    def parametrization(self) -> str:
        """The FQN of the module that computes the parametrised weight."""
        return f"{self.module_fqn}.parametrizations.{self.name}".removeprefix(".")

    @property
    def names(self) -> tuple[str, ...]:
        """The FQN, for selection."""
        return (self.fqn,)

    @property
    def modules(self) -> tuple[str, ...]:
        """The module's FQN, for selection."""
        return (self.module_fqn,)

    @property
    def kind(self) -> type[nn.Module]:
        """The module's type without parametrizations, for selection."""
        return parametrize.type_before_parametrizations(self.module)

    def strip_(self) -> None:
        """Take the spectral norm off the module, in place: ``weight`` becomes the parameter it normalised.

        Raises:
            ValueError: The module carries further parametrizations, or the weight is pruned, which would be
                lost; or the spectral norm is a subclass of torch's, which may compute something else.
        """
        if self.name in _parametrizations(self.module):
            _strip_parametrization_(self.module, self.name)
        else:
            _strip_hook_(self.module, self.name)


def read_stripped_(graph: fx.Graph, stripped: Iterable[TorchSN]) -> None:
    """Read the parameter where a graph calls the parametrization that has been stripped, in place.

    ``F.linear(x, self.lin.weight)`` on a parametrised layer is traced as a call of the module
    ``lin.parametrizations.weight``.

    Args:
        graph: Traced before the stripping.
        stripped: What has been stripped.
    """
    parameters = {sn.parametrization: sn.fqn for sn in stripped}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in parameters:
            with graph.inserting_before(node):
                read = graph.get_attr(parameters[node.target])
            read.meta = copy.copy(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)


def find_torch_sn(model: nn.Module) -> dict[str, TorchSN]:
    """All weights of a model that carry torch's spectral norm, either API.

    Args:
        model: Any module.

    Returns:
        By FQN, in module order.
    """
    found = [sn for fqn, module in model.named_modules() for sn in _on_module(fqn, module)]
    return {sn.fqn: sn for sn in found}


def find_exported_sn(model: nn.Module) -> list[str]:
    """The weights whose spectral norm, torch's or ours, ``torch.export`` has spread out into operations.

    Args:
        model: Any module.

    Returns:
        FQNs, by the names that parameters and buffers have kept. There is no module left to take it from.
    """
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    known = {*find_torch_sn(model)}
    for name, part in model.named_modules():
        if isinstance(part, SpectralNormGraphModule):
            known |= {f"{name}.{site.fqn}".removeprefix(".") for site in part.sites()}
    is_graph = isinstance(model, fx.GraphModule)  # else u and v beside a weight may be of another kind
    found = checkpoint.find_weights(names)
    return [fqn for fqn, keys in found if fqn not in known and (keys.weight != fqn or is_graph)]


def _on_module(fqn: str, module: nn.Module) -> Iterator[TorchSN]:
    for name, steps in _parametrizations(module).items():
        if isinstance(steps, parametrize.ParametrizationList):
            for step in steps:
                # A one-dimensional parameter is merely normalised, without u and v.
                if isinstance(step, _Parametrization) and hasattr(step, "_u"):
                    config = SpectralNormConfig(step.n_power_iterations, step.eps, step.dim)
                    yield TorchSN(fqn, module, name, config, step._u, step._v)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Hook):
            config = SpectralNormConfig(hook.n_power_iterations, hook.eps, hook.dim, order="vu")
            buffers: Any = module._buffers
            u, v = buffers[f"{hook.name}_u"], buffers[f"{hook.name}_v"]
            yield TorchSN(fqn, module, hook.name, config, u, v)


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    # Not parametrize.is_parametrized: fx.symbolic_trace copies what a function reads of a parametrised layer
    # into plain modules.
    holder = module._modules.get("parametrizations")
    return {} if holder is None else dict(holder.named_children())


def _strip_parametrization_(module: nn.Module, name: str) -> None:
    # Not parametrize.remove_parametrizations: it deletes the property from the parametrised class, which
    # a copy shares with the module it was copied from.
    parametrizations = _parametrizations(module)
    on_weight = [type(step).__name__ for step in parametrizations[name]]
    elsewhere = [other for other in parametrizations if other != name]
    if len(on_weight) > 1 or elsewhere:
        raise ValueError(
            f"{type(module).__name__} carries parametrizations beside spectral norm on {name!r} (on it: "
            f"{', '.join(on_weight)}; on others: {', '.join(elsewhere) or 'none'}), and only spectral norm "
            f"alone can be taken over. Remove the others with "
            f"torch.nn.utils.parametrize.remove_parametrizations, or leave the module out of select."
        )
    _refuse_subclass(module, parametrizations[name][0], _Parametrization)
    original = _original(parametrizations[name], "original", module)
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    _restore_(module, name, original)


def _strip_hook_(module: nn.Module, name: str) -> None:
    # Not remove_spectral_norm: it leaves W / sigma behind, not W.
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Hook) and hook.name == name:
            _refuse_subclass(module, hook, _Hook)
    original = _original(module, f"{name}_orig", module)
    del module._parameters[f"{name}_orig"]
    for suffix in ("_u", "_v"):
        del module._buffers[name + suffix]
    del module.__dict__[name]  # the last W / sigma
    registered: Any = (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)
    for hooks in registered:
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps load hooks
            hook = getattr(hook, "fn", hook)  # the state dict hooks hold the forward hook
            if isinstance(hook, _Hook) and hook.name == name:
                del hooks[key]
    _restore_(module, name, original)


def _refuse_subclass(module: nn.Module, found: Any, torchs: type) -> None:
    # To bound sigma by a coefficient, say, as for SNGP.
    if type(found) is not torchs:
        raise ValueError(
            f"{type(module).__name__} carries spectral norm by {type(found).__name__}, a class derived from "
            f"torch's, which may compute something else, and only torch's own can be taken over. Leave the "
            f"module out of select."
        )


def _original(owner: nn.Module, name: str, module: nn.Module) -> nn.Parameter | None:
    if name not in owner._parameters:
        raise ValueError(
            f"{type(module).__name__} carries spectral norm on a weight that is computed from others, as by "
            f"torch.nn.utils.prune, and only a parameter can be taken over. Make it one first "
            f"(torch.nn.utils.prune.remove), or leave the module out of select."
        )
    return owner._parameters[name]


def _restore_(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    # Last, as both APIs have it: by its place an optimizer's state finds its parameter.
    module._parameters[name] = parameter
