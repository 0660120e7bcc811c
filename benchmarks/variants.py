"""What is compared: a model without spectral norm, with torch's, torch's old one, and ours in two ways."""

import types
from collections.abc import Callable
from typing import Any

import torch
from models import Case
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import specnorm_fx
from specnorm_fx import gradient_penalty
from specnorm_fx.graph_module import SpectralNormGraphModule, owner_of, spectral_norm_node

__all__ = [
    "DIRECTIONS",
    "LABELS",
    "MODES",
    "VARIANTS",
    "build",
    "in_mode",
    "normalization",
    "penalty_step",
    "training_step",
    "variants_in",
]

LABELS = {
    "none": "no SN",
    "torch": "torch SN",
    "legacy": "legacy torch SN",
    "ours": "specnorm_fx",
    "backend": "backend specnorm",  # torch SN as it is, fused where it is compiled
}
VARIANTS = tuple(LABELS)
DIRECTIONS = ("forward", "forward + backward")  # of the spectral norm part alone
# By device. The CPU has no launches that CUDA graphs, the idea of reduce-overhead, could save.
MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "reduce-overhead")}


def variants_in(mode: str) -> tuple[str, ...]:
    """The variants that differ in a mode: in eager mode there is no backend.

    Args:
        mode: One of `MODES`.
    """
    return tuple(v for v in VARIANTS if mode != "eager" or v != "backend")


def build(case: Case, variant: str, device: str) -> nn.Module:
    """A model in training mode; every variant normalises the same weights.

    Args:
        case: The model.
        variant: One of `VARIANTS`.
        device: Where it goes.
    """
    torch.manual_seed(0)
    model = case.make().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != case.parameters:
        raise ValueError(
            f"{case.name} has {parameters} parameters, not the {case.parameters} it is known by."
        )
    # Also where only the names are wanted, or nothing: what it leaves on the heap is then the same for all.
    transformed = specnorm_fx.transform(model, case.select)
    if variant == "ours":
        return transformed
    if variant == "none":
        return _own_code_(model)
    apply = legacy_spectral_norm if variant == "legacy" else parametrizations.spectral_norm
    for site in transformed.sites():
        apply(*owner_of(model, site.fqn))
    return _own_code_(model)


def in_mode(module: nn.Module, variant: str, mode: str) -> Callable[..., object]:
    """The module itself, or compiled.

    Args:
        module: From `build` or `normalization`.
        variant: Its variant.
        mode: One of `MODES`.
    """
    if mode == "eager":
        return module
    backend = specnorm_fx.specnorm if variant == "backend" else "inductor"
    compiled = torch.compile(
        module, backend=backend, mode=None if mode == "compiled" else mode, dynamic=False
    )
    if mode == "compiled":
        return compiled

    def replay(*inputs: Tensor) -> object:
        # A forward whose backward never comes would otherwise keep the next one off the recorded graph.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*inputs)

    return replay


def training_step(
    model: nn.Module, variant: str, mode: str, optimizer: torch.optim.Optimizer
) -> Callable[..., None]:
    """Forward, backward and optimizer step of one batch; compiled is the model only.

    Args:
        model: From `build`.
        variant: Its variant.
        mode: One of `MODES`.
        optimizer: Steps the model's parameters.

    Returns:
        To be called with the inputs.
    """
    run = in_mode(model, variant, mode)
    return _step(lambda *inputs: loss(run(*inputs)), optimizer)


def penalty_step(
    model: nn.Module, variant: str, mode: str, optimizer: torch.optim.Optimizer
) -> Callable[..., None]:
    """A WGAN-GP step: three forwards, the gradient of one of them, backward and optimizer step.

    Compiled is all of it up to the loss.

    Args:
        model: From `build`.
        variant: Its variant.
        mode: One of `MODES`.
        optimizer: Steps the model's parameters.

    Returns:
        To be called with real and generated samples, and the labels, if there are any.
    """
    return _step(in_mode(_own_code_(_PenaltyLoss(model)), variant, mode), optimizer)


class _PenaltyLoss(nn.Module):
    """Wasserstein loss with gradient penalty; a module so that it can have code of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Tensor:
        penalty = gradient_penalty.wgan_gp(self.model, real, fake, *labels, score=_total)
        return loss(self.model(real, *labels)) - loss(self.model(fake, *labels)) + 10 * penalty


def _total(output: Tensor | list[Tensor]) -> Tensor:
    scores = [output] if isinstance(output, Tensor) else output
    return torch.stack([score.sum() for score in scores])


def _step(losses: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    def step(*inputs: Tensor) -> None:
        losses(*inputs).backward()
        optimizer.step()
        # At the end and not at the head, which is the same in a loop: gradients of models that wait for
        # their turn would only take memory.
        optimizer.zero_grad(set_to_none=True)

    return step


def loss(output: Tensor | list[Tensor]) -> Tensor:
    """The mean score, summed over outputs.

    Its gradient never vanishes, as that of the hinge does: zeros and the denormals they leave behind take
    another time.

    Args:
        output: Of a discriminator.
    """
    scores = [output] if isinstance(output, Tensor) else output
    return -sum(score.mean() for score in scores)


def normalization(model: nn.Module, variant: str) -> tuple[nn.Module, list[Tensor]]:
    """The spectral norm part of a model alone.

    Args:
        model: From `build`.
        variant: Its variant, not ``"none"``.

    Returns:
        A module without inputs that gives all normalised weights, and the stored weights.
    """
    if variant == "ours":
        return _head(model), [site.weight for site in model.sites()]
    if variant in ("torch", "backend"):
        layers = [m for m in model.modules() if nn.utils.parametrize.is_parametrized(m, "weight")]
        return _own_code_(_Parametrized(layers)), [m.parametrizations.weight.original for m in layers]
    layers = [m for m in model.modules() if hasattr(m, "weight_orig")]
    return _own_code_(_Hooked(layers)), [m.weight_orig for m in layers]


class _Parametrized(nn.Module):
    """Torch's spectral norm: reading the weight computes it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


class _Hooked(nn.Module):
    """Torch's old spectral norm: a hook before the layer's forward sets the weight."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, None)
        return [layer.weight for layer in self.layers]


def _head(gm: SpectralNormGraphModule) -> fx.GraphModule:
    """The transformed model's graph up to the `SpectralNorm` call: reads W, u and v, and makes the call."""
    call = spectral_norm_node(gm)
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in call.all_input_nodes}
    graph.output(graph.node_copy(call, copies.__getitem__))
    return fx.GraphModule(gm, graph)


def _own_code_(module: nn.Module) -> nn.Module:
    """Give a module a forward with a code object of its own.

    ``torch.compile`` keeps what it compiled with the code object of the forward, which all modules of a class
    share. Models of one class would wait for each other's guards to fail, or worse: there are no guards on
    hooks (``skip_nnmodule_hook_guards``), so that one with the old spectral norm could run as one without.

    The code seems to come from this file, since a forward of torch's own, Sequential's, would be compiled
    through a frame that all share.
    """
    forward = type(module).forward
    code = forward.__code__.replace(co_filename=__file__)
    own = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    module.forward = types.MethodType(own, module)
    return module
