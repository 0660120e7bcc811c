"""specnorm_fx: spectral norm for PyTorch models as a graph pass."""

import importlib
from typing import TYPE_CHECKING, Any

from specnorm_fx import gradient_penalty as gradient_penalty
from specnorm_fx.checkpoint import convert_state_dict as convert_state_dict
from specnorm_fx.config import SpectralNormConfig as SpectralNormConfig
from specnorm_fx.explain import explain as explain
from specnorm_fx.freeze import freeze as freeze
from specnorm_fx.freeze import frozen_state_dict as frozen_state_dict
from specnorm_fx.passes import SpectralNormPass as SpectralNormPass
from specnorm_fx.passes import transform as transform
from specnorm_fx.report import SigmaLogger as SigmaLogger
from specnorm_fx.report import report as report
from specnorm_fx.report import sigmas as sigmas
from specnorm_fx.update import update_ as update_
from specnorm_fx.update import update_after as update_after
from specnorm_fx.update import warm_up_ as warm_up_

if TYPE_CHECKING:
    from specnorm_fx import onnx as onnx
    from specnorm_fx.backend import FuseSpectralNorm as FuseSpectralNorm
    from specnorm_fx.backend import specnorm as specnorm

__all__ = [
    "FuseSpectralNorm",
    "SigmaLogger",
    "SpectralNormConfig",
    "SpectralNormPass",
    "convert_state_dict",
    "explain",
    "freeze",
    "frozen_state_dict",
    "gradient_penalty",
    "onnx",
    "report",
    "sigmas",
    "specnorm",
    "transform",
    "update_",
    "update_after",
    "warm_up_",
]


def __getattr__(name: str) -> Any:
    """On first use: the compiler's side takes as long to load as torch itself, and ONNX's needs numpy."""
    if name in ("FuseSpectralNorm", "specnorm"):
        return getattr(importlib.import_module("specnorm_fx.backend"), name)
    if name == "onnx":
        return importlib.import_module("specnorm_fx.onnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
