"""The extra ``onnx``: its libraries, imported only where they are used."""

import importlib
from typing import Any

__all__ = ["require"]


def require(*names: str) -> list[Any]:
    """Import modules of the extra.

    Args:
        names: Of modules, such as ``onnx.reference``.

    Returns:
        The modules, in that order.

    Raises:
        ImportError: The extra is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"specnorm_fx.onnx needs {error.name}: pip install 'specnorm-fx[onnx]'.") from error
