"""How ``torch.compile`` reaches `specnorm_fx.fuse`: as a Dynamo backend, or as a pass within Inductor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from specnorm_fx import ops
from specnorm_fx.config import SpectralNormConfig
from specnorm_fx.fuse import fuse_, fuse_graph_

__all__ = ["FuseSpectralNorm", "specnorm"]

# What decides on the graph that comes out, beside ops.REVISION.
_SOURCES = tuple(str(Path(__file__).with_name(name)) for name in ("fuse.py", "ops.py", "reference.py"))


def specnorm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The Dynamo backend: ``torch.compile(model, backend="specnorm")``.

    In every graph that Dynamo captures, torch's spectral norm (parametrization and legacy hook, training and
    eval) goes through one operator; see `specnorm_fx.fuse.fuse_`. The model, its state dict and what it
    computes stay as they are. What is not recognised is passed through and logged once.

    Args:
        gm: From Dynamo.
        example_inputs: From Dynamo.
        mode: As in ``torch.compile``, for Inductor.
        options: ``"inner"``: the backend that compiles the graph, a name or a function (``"inductor"``).
            ``"implementation"``: as in `specnorm_fx.SpectralNormConfig` (``"auto"``). All others go to the
            inner backend.

    Returns:
        The compiled graph.

    Raises:
        ValueError: ``implementation`` is none.
        RuntimeError: Inductor does not know an option.
    """
    rest = dict(options or {})
    inner = rest.pop("inner", "inductor")
    implementation = SpectralNormConfig(implementation=rest.pop("implementation", "auto")).implementation
    fuse_(gm, implementation)
    if inner == "inductor":
        # What torch.compile itself makes of mode and options; it checks their names and types.
        return torch._TorchCompileInductorWrapper(mode, rest, None)(gm, example_inputs)
    compiler: Any = lookup_backend(inner)
    given = {"mode": mode, "options": rest}
    return compiler(gm, example_inputs, **{name: value for name, value in given.items() if value})


class FuseSpectralNorm(CustomGraphPass):
    """What `specnorm` does, as a pass within Inductor.

    ``torch.compile(model, options={"pre_grad_custom_pass": specnorm_fx.FuseSpectralNorm()})``. Inductor's
    cache takes `uuid` into account.

    Args:
        implementation: As in `specnorm_fx.SpectralNormConfig`.

    Raises:
        ValueError: ``implementation`` is none.
    """

    def __init__(self, implementation: str = "auto") -> None:
        self.implementation = SpectralNormConfig(implementation=implementation).implementation

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place, as Inductor asks for."""
        fuse_graph_(graph, self.implementation)

    def uuid(self) -> bytes:
        """A hash of the code that does it, the operators' revision and the options."""
        digest: bytes = get_hash_for_files(_SOURCES, f"{ops.REVISION} {self.implementation}")
        return digest
