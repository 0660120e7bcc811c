"""Weights in a file beside the graph, named by what is in it."""

import glob
from pathlib import Path

from torch import nn

from specnorm_fx.load import sha256
from specnorm_fx.onnx.extra import require

__all__ = ["is_external", "name_by_content", "remove_older"]

# Weights above this size stand in a file of their own: a protobuf ends at 2 GiB.
EXTERNAL_ABOVE = 1.5 * 2**30


def is_external(model: nn.Module, external_data: bool | None = None) -> bool:
    """Whether the weights of a model go into a file of their own.

    Args:
        model: Frozen.
        external_data: What the user asks for; None decides by their size.

    Raises:
        ValueError: They are too large for the file of the graph.
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    if external_data is False and size > EXTERNAL_ABOVE:
        raise ValueError(
            f"external_data must be None or True above {EXTERNAL_ABOVE / 2**30} GiB, got {size / 2**30:.1f} "
            f"GiB of weights: an ONNX file by itself ends at 2 GiB."
        )
    return size > EXTERNAL_ABOVE if external_data is None else external_data


def name_by_content(written: Path) -> str | None:
    """Name the file of the weights, if there is one, by what is in it.

    Two files cannot be replaced in one step. By a fixed name, an export killed between the two would leave
    the old graph with the new weights.

    Args:
        written: The file of the graph.

    Returns:
        The name.
    """
    data = written.with_name(f"{written.name}.data")
    if not data.exists():
        return None
    (onnx,) = require("onnx")
    name = f"{written.name}.{sha256(data)[:16]}.data"
    proto = onnx.load(written, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(proto, written)
    data.rename(data.with_name(name))
    return name


def remove_older(target: Path, current: str | None) -> None:
    """Remove the weights of the graphs that have stood at ``target`` before.

    Args:
        target: The file of the graph.
        current: The name of its own weights.
    """
    for file in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 16}.data"):
        if file.name != current:
            file.unlink()
