"""specnorm_fx: spectral norm for PyTorch models as a graph pass."""

from specnorm_fx import gradient_penalty as gradient_penalty
from specnorm_fx import onnx as onnx
from specnorm_fx.checkpoint import convert_state_dict as convert_state_dict
from specnorm_fx.config import SpectralNormConfig as SpectralNormConfig
from specnorm_fx.freeze import freeze as freeze
from specnorm_fx.freeze import frozen_state_dict as frozen_state_dict
from specnorm_fx.passes import SpectralNormPass as SpectralNormPass
from specnorm_fx.passes import transform as transform
from specnorm_fx.report import report as report
from specnorm_fx.report import sigmas as sigmas
from specnorm_fx.update import update_ as update_
from specnorm_fx.update import warm_up_ as warm_up_

__all__ = [
    "SpectralNormConfig",
    "SpectralNormPass",
    "convert_state_dict",
    "freeze",
    "frozen_state_dict",
    "gradient_penalty",
    "onnx",
    "report",
    "sigmas",
    "transform",
    "update_",
    "warm_up_",
]
