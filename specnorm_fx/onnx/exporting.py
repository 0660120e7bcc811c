"""``export``: freeze, write, verify, and only then let the file stand at its path."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from specnorm_fx.atomic import replaced
from specnorm_fx.freeze import freeze, whole_copy
from specnorm_fx.graph_module import SpectralNormGraphModule, resolve
from specnorm_fx.onnx.batches import (
    Args,
    as_batch,
    dynamic_dimensions,
    in_order_of,
    random_batches,
    tensor_names,
)
from specnorm_fx.onnx.external_data import is_external, name_by_content, remove_older
from specnorm_fx.onnx.extra import require
from specnorm_fx.onnx.precision import checked_calibration
from specnorm_fx.onnx.verification import Verification, VerificationError, refuse_training, verify
from specnorm_fx.onnx.writing import append_metadata, write
from specnorm_fx.report import sigmas

__all__ = ["export"]

# The keys of the metadata that export itself writes.
OWN = ("folded", "max_rel_error", "opset", "precision", "sigmas", "version")

# Where a file does not agree with its model.
NOT_FP32 = (
    " If the forward makes fp32 tensors of its own (torch.arange(4.), x.float() before a layer), give them "
    "the dtype of its input (or of the layer's weight), or make them buffers."
)
OTHER_OPSET = " Leave opset_version out: the exporter can have written operators of a later one."
REMEDIES = {"fp16": NOT_FP32, "bf16": NOT_FP32}


def export(
    model: nn.Module,
    args: Args,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    axes: Mapping[str, Mapping[int, str | None]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    precision: str = "fp32",
    calibration: Iterable[Args] | None = None,
    external_data: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    n_batches: int = 3,
    rtol: float | None = None,
) -> Verification:
    """Write a transformed model to an ONNX file, its weights frozen, and verify the file.

    The graph has the nodes of the same model without spectral norm, and initializers have the
    parameters' names (a matrix that the exporter stores transposed for MatMul, too). Floating inputs and
    outputs are fp32 whatever the precision and the model's dtype, so that the same feeds work. The file
    appears at ``path`` only when it has passed `verify` on random batches of the shapes of ``args``, of
    other sizes as well where a dimension is dynamic; integer inputs are drawn from the values in ``args``.

    Its ``metadata_props`` have, under keys with the prefix ``specnorm_fx.``: ``version``, ``opset``,
    ``precision``, ``sigmas`` (a JSON object, by FQN), ``folded`` (a JSON list of the parameters that the
    exporter has multiplied with the scales of a batch norm after them, if there are any), ``max_rel_error``,
    and what ``metadata`` adds. The same input gives the same bytes, on the same machine with the same number
    of threads.

    Args:
        model: A transformed model in eval mode, or what `specnorm_fx.freeze` made of one (no ``sigmas``).
        args: Example inputs: one tensor, or a tuple of positional arguments.
        path: The file to write; an existing one is replaced.
        dynamic_batch: The first dimension of every input tensor is free, under the name ``batch``.
        dynamic_shapes: Instead of ``dynamic_batch`` and ``axes``: as in ``torch.export.export``.
        axes: Dynamic dimensions by the name of the input, ``{"x": {0: "batch", 2: "height"}}``. One name
            is one size. None as the name leaves it to the exporter.
        input_names: Names of the graph's inputs; by default those of the forward's arguments.
        output_names: Names of its outputs.
        opset_version: The ONNX opset; by default the exporter's, and at least 22 for bf16.
        precision: ``"fp32"``; ``"fp16"`` or ``"bf16"``: weights and everything between inputs and
            outputs (ONNX Runtime has no bf16 on the CPU: such a file is for other devices, and verified
            by onnx's reference evaluator); ``"int8"``: ONNX Runtime's static quantization, weights
            per channel, as QuantizeLinear and DequantizeLinear around the operators.
        calibration: For int8, required: batches like ``args`` of real data, which decide on the ranges
            of activations. The file is verified on the first ``n_batches`` of them.
        external_data: Whether the weights go into a file beside ``path``, ``<path>.<hash>.data``; by
            default above 1.5 GiB. Such files of an older export to ``path`` are removed.
        metadata: More of it, such as ``{"source_checkpoint_sha256": ...}``.
        n_batches: How many random batches to verify on.
        rtol: As in `verify`.

    Returns:
        What was compared, and the nodes written.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        TypeError: ``model`` holds no transformed model, or has one only as a part.
        ValueError: The model has forward hooks; options exclude each other, or are missing; ``args`` hold no
            tensor, ``axes`` name none or one that the model fixes, the exporter cannot write this opset, or a
            name stands for two tensors.
        RuntimeError: It is in training mode, or torch's exporter fails on it.
        OSError: ``path`` cannot be written.
        VerificationError: The file does not agree with the model; none is left behind.
    """
    require("onnx", "onnxscript", "onnxruntime")
    args = as_batch(args)
    refuse_training(model)
    gm = resolve(model)
    if gm._forward_hooks or gm._forward_pre_hooks:
        raise ValueError(
            f"{type(gm).__name__} has forward hooks, which torch's exporter leaves out. Remove them; or "
            f"capture the model with them, transform(model, example_inputs=...)."
        )
    for option, given in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(given, str):
            raise ValueError(f"{option} must be a list of names, got {given!r}.")
    if n_batches < 1:
        raise ValueError(f"n_batches must be at least 1, got {n_batches}.")
    names = tensor_names(gm, args, input_names)
    if dynamic_shapes is not None and (dynamic_batch or axes is not None):
        raise ValueError("export takes dynamic_batch and axes, or dynamic_shapes, not both.")
    free = dynamic_dimensions(args, names, axes or {}, dynamic_batch)
    batches = [in_order_of(args, batch) for batch in checked_calibration(precision, calibration, names)]
    if taken := sorted({*OWN} & set(metadata or {})):
        raise ValueError(f"metadata must have other keys than the file's own, got {', '.join(taken)}.")
    if wrong := [key for key, value in (metadata or {}).items() if not isinstance(value, str)]:
        raise ValueError(f"metadata must be text, got another type under {', '.join(map(str, wrong))}.")
    frozen = freeze(gm) if gm.sites() else whole_copy(gm)
    external_data = is_external(frozen, external_data)

    target = Path(path)
    with replaced(target) as written:
        opset, folded = write(
            frozen,
            args,
            written,
            precision=precision,
            calibration=batches,
            opset_version=opset_version,
            external_data=external_data,
            free=free,
            dynamic_shapes=dynamic_shapes,
            # All, since the exporter's own are those of its graph, in lower case and without dots.
            input_names=names if len({*names}) == len(names) else input_names,
            output_names=output_names,
        )
        data = name_by_content(written)
        try:
            verification = verify(
                written, gm, batches[:n_batches] or random_batches(args, free, n_batches), rtol=rtol
            )
        except VerificationError as error:
            message = str(error).replace(str(written), str(target))
            remedy = REMEDIES.get(precision, "") + (OTHER_OPSET if opset_version is not None else "")
            raise VerificationError(f"{message}{remedy} No file was written.") from error
        own = _own(gm, precision, opset, folded, verification)
        append_metadata(written, own | dict(metadata or {}))
    remove_older(target, data)
    return dataclasses.replace(verification, path=target)


def _own(
    gm: SpectralNormGraphModule, precision: str, opset: int, folded: list[str], verification: Verification
) -> dict[str, str]:
    """What export itself says in the metadata, under the keys `OWN`."""
    own = {
        "version": _version(),
        "precision": precision,
        "opset": str(opset),
        "max_rel_error": f"{verification.max_rel_error:.2e}",
    }
    if folded:
        own["folded"] = json.dumps(folded)
    if gm.sites():
        found = sigmas(gm)
        # The exporter keeps one name of a tied weight, and not always the first.
        by_name = {name: float(found[site.fqn]) for site in gm.sites() for name in site.names}
        own["sigmas"] = json.dumps(by_name)
    return own


def _version() -> str:
    """That of this library, "unknown" where it runs from a source tree that nobody installed."""
    try:
        return importlib.metadata.version("specnorm-fx")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
