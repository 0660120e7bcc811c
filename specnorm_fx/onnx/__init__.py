"""Export to ONNX, frozen and verified. Only this package imports onnx and onnxruntime, where it uses them.

``export`` freezes, so that the file has the nodes of the same model without spectral norm, and lets a
file stand at its path only after ``verify`` has passed.
"""

from specnorm_fx.onnx.exporting import export as export
from specnorm_fx.onnx.reading import inputs_of as inputs_of
from specnorm_fx.onnx.reading import weights_of as weights_of
from specnorm_fx.onnx.verification import Verification as Verification
from specnorm_fx.onnx.verification import VerificationError as VerificationError
from specnorm_fx.onnx.verification import verify as verify

__all__ = ["Verification", "VerificationError", "export", "inputs_of", "verify", "weights_of"]
