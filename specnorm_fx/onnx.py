"""Export to ONNX, frozen and verified. The only file that imports onnx and onnxruntime.

``export`` freezes, so that the file has the nodes of the same model without spectral norm, and lets a
file stand at its path only after ``verify`` has passed.
"""

import contextlib
import glob
import hashlib
import importlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from specnorm_fx.atomic import replaced
from specnorm_fx.freeze import freeze
from specnorm_fx.graph_module import resolve

__all__ = ["Verification", "VerificationError", "export", "inputs_of", "verify"]

Args: TypeAlias = "Tensor | tuple[Any, ...]"

# Outputs may differ by this many machine epsilons, relative to the largest value of the output: a sum
# of n products in another order differs by about sqrt(n) of them, and layers add up.
TOLERANCE = 128


class VerificationError(RuntimeError):
    """An ONNX file does not compute what the model computes."""


@dataclass(frozen=True)
class Verification:
    """A file that agrees with its model.

    Attributes:
        path: The file.
        batches: On how many batches it was compared.
        max_abs_error: The largest difference of any output value.
        max_rel_error: The largest difference relative to the largest value of its output.
        rtol: What ``max_rel_error`` was held to.
        nodes: How many nodes of each operator the graph has.
    """

    path: Path
    batches: int
    max_abs_error: float
    max_rel_error: float
    rtol: float
    nodes: dict[str, int]

    def __str__(self) -> str:
        nodes = ", ".join(f"{count} {name}" for name, count in sorted(self.nodes.items()))
        return (
            f"{self.path}: {nodes}\n"
            f"agrees with the model on {self.batches} batches: max abs error {self.max_abs_error:.2e}, "
            f"max relative error {self.max_rel_error:.2e} (limit {self.rtol:.2e})"
        )


def export(
    model: nn.Module,
    args: Args,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    n_batches: int = 3,
    rtol: float | None = None,
) -> Verification:
    """Write a transformed model to an ONNX file, its weights frozen, and verify the file.

    The graph has the nodes of the same model without spectral norm, and initializers have the
    parameters' names (a matrix that the exporter stores transposed for MatMul, too). The file appears
    at ``path`` only when it has passed `verify` on random batches of the shapes of ``args``, of other
    batch sizes as well where the batch is dynamic; integer inputs are drawn from the values in ``args``.

    Args:
        model: A transformed model in eval mode, or what `specnorm_fx.freeze` made of one.
        args: Example inputs: one tensor, or a tuple of positional arguments.
        path: The file to write; an existing one is replaced. Above 1.5 GiB of weights they go into
            a file beside it, ``<path>.<hash>.data``; that of the file replaced is removed.
        dynamic_batch: The first dimension of every input tensor is free, under the name ``batch``.
        dynamic_shapes: Instead of ``dynamic_batch``: as in ``torch.export.export``.
        input_names: Names of the graph's inputs; by default those of the forward's arguments.
        output_names: Names of its outputs.
        opset_version: The ONNX opset; by default the exporter's.
        n_batches: How many random batches to verify on.
        rtol: As in `verify`.

    Returns:
        What was compared, and the nodes written.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        TypeError: ``model`` holds no transformed model.
        ValueError: Both ``dynamic_batch`` and ``dynamic_shapes`` are given, ``args`` hold no tensor, or the
            exporter cannot write this opset.
        RuntimeError: It is in training mode.
        OSError: ``path`` cannot be written.
        VerificationError: The file does not agree with the model; none is left behind.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    args = args if isinstance(args, tuple) else (args,)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("args must hold at least one tensor, the example input.")
    if dynamic_batch:
        if dynamic_shapes is not None:
            raise ValueError("export takes dynamic_batch or dynamic_shapes, not both.")
        batch = torch.export.Dim("batch")
        dynamic_shapes = pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, args)
    _refuse_training(model)
    gm = resolve(model)
    frozen = freeze(gm) if gm.sites() else gm

    target = Path(path)
    with replaced(target) as written:
        with _quiet_exporter():
            program: Any = torch.onnx.export(
                frozen,
                args,
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                opset_version=opset_version,
            )
        # The exporter only logs that it has kept its own opset.
        if opset_version not in (None, written_opset := program.model.opset_imports[""]):
            raise ValueError(
                f"opset_version={opset_version} cannot be had for this model: the exporter of torch "
                f"{torch.__version__} writes opset {written_opset}. Leave it out, or try one nearer to that."
            )
        _name_initializers_(program.model, frozen)
        _drop_stack_traces_(program.model)
        program.save(written)
        data = _name_data_by_content(written)
        batches = _random_batches(args, n_batches, dynamic_batch)
        try:
            verification = verify(written, gm, batches, rtol=rtol)
        except VerificationError as error:
            message = str(error).replace(str(written), str(target))
            raise VerificationError(f"{message} No file was written.") from error
    _remove_older_data(target, data)
    return replace(verification, path=target)


def verify(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: "Args | Sequence[Args]",
    *,
    rtol: float | None = None,
) -> Verification:
    """Hold an ONNX file against a model: ``onnx.checker``, then ONNX Runtime against eager outputs.

    Args:
        path: The file.
        model: Any module in eval mode, transformed or not.
        inputs: One batch (a tensor, or a tuple of positional arguments) or a list of them.
        rtol: The largest difference allowed, relative to the largest value of the output; by default
            128 machine epsilons of the output's dtype (1.5e-5 in fp32), and none for integers.

    Returns:
        The largest differences found.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: ``inputs`` is empty.
        RuntimeError: ``model`` is in training mode.
        VerificationError: The file is no valid ONNX, its inputs or outputs are others, or a value
            differs by more than ``rtol``; the message has the figures.
    """
    onnx, onnxruntime = _require("onnx", "onnxruntime")
    _refuse_training(model)
    batches = [b if isinstance(b, tuple) else (b,) for b in _as_list(inputs)]
    if not batches:
        raise ValueError("inputs must hold at least one batch.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    try:
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # both libraries raise types of their own, directly under Exception
        raise VerificationError(f"{path} is not a valid ONNX model: {error}") from error

    worst_abs = worst_rel = limit = 0.0
    for number, batch in enumerate(batches):
        outputs = _run(session, path, batch)
        with torch.no_grad():
            expected = [t for t in pytree.tree_leaves(model(*batch)) if isinstance(t, Tensor)]
        if len(outputs) != len(expected):
            raise VerificationError(f"{path} has {len(outputs)} outputs, and the model has {len(expected)}.")
        for output, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            abs_error, rel_error = _errors(path, got, want.cpu())
            limit = _tolerance(want.dtype) if rtol is None else rtol
            # Written so that NaN fails.
            if not rel_error <= limit:
                raise VerificationError(
                    f"{path} disagrees with {type(model).__name__} on batch {number}, output {output}: max "
                    f"abs error {abs_error:.3e}, max relative error {rel_error:.3e}, limit {limit:.3e}."
                )
            worst_abs, worst_rel = max(worst_abs, abs_error), max(worst_rel, rel_error)
    nodes = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    return Verification(path, len(batches), worst_abs, worst_rel, limit, dict(nodes))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _run(session: Any, path: Path, batch: tuple[Any, ...]) -> list[np.ndarray]:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    names = [node.name for node in session.get_inputs()]
    if len(names) != len(tensors):
        raise VerificationError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), and the batch has {len(tensors)}."
        )
    feeds = {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}
    try:
        outputs: list[np.ndarray] = session.run(None, feeds)
    except Exception as error:  # onnxruntime raises types of its own, directly under Exception
        raise VerificationError(f"ONNX Runtime cannot run {path}: {error}") from error
    return outputs


def _errors(path: Path, got: np.ndarray, want: Tensor) -> tuple[float, float]:
    if got.shape != tuple(want.shape):
        raise VerificationError(
            f"{path} gives an output of shape {got.shape}, and the model {tuple(want.shape)}."
        )
    truth = want.numpy().astype(np.float64)
    error = float(np.abs(got.astype(np.float64) - truth).max(initial=0.0))
    scale = float(np.abs(truth).max(initial=0.0))
    return error, error / scale if scale else error


def _random_batches(args: tuple[Any, ...], n_batches: int, dynamic_batch: bool) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def redrawn(leaf: Any, size: int | None) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = leaf.shape if size is None or not leaf.ndim else (size, *leaf.shape[1:])
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator).to(leaf)
        # Labels and masks: only the values of the example are known to be valid.
        index = torch.randint(leaf.numel(), shape, generator=generator)
        return leaf.flatten()[index.to(leaf.device)]

    sizes = [number + 1 if dynamic_batch else None for number in range(n_batches)]
    return [pytree.tree_map(lambda leaf, size=size: redrawn(leaf, size), args) for size in sizes]


def _name_initializers_(model: Any, frozen: fx.GraphModule) -> None:
    """Give a matrix that the exporter folded into its transpose the name of its parameter, in place."""
    taken = set(model.graph.initializers)
    missing = {
        name: parameter.detach().cpu().numpy()
        for name, parameter in frozen.named_parameters()
        if name not in taken and parameter.ndim == 2 and parameter.dtype != torch.bfloat16
    }
    for value in list(model.graph.initializers.values()):
        array = value.const_value.numpy()
        for name, parameter in missing.items():
            if array.shape == parameter.shape[::-1] and np.array_equal(array, parameter.T):
                value.name = name
                del missing[name]
                break


def _drop_stack_traces_(model: Any) -> None:
    """The paths and source lines of the exporting machine have no place in a deployed file, in place."""
    for node in model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _name_data_by_content(written: Path) -> str | None:
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
    (onnx,) = _require("onnx")
    digest = hashlib.sha256()
    with data.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    name = f"{written.name}.{digest.hexdigest()[:16]}.data"
    proto = onnx.load(written, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(proto, written)
    data.rename(data.with_name(name))
    return name


def _remove_older_data(target: Path, current: str | None) -> None:
    """The weights of the graphs that have stood at ``target`` before."""
    for file in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 16}.data"):
        if file.name != current:
            file.unlink()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what torch.onnx says about itself: each message here was seen with torch 2.13."""
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch.onnx._internal.exporter._registration",  # "torchvision is not installed. Skipping ..."
            "torch.onnx._internal.exporter._compat",  # an opset that it cannot convert to, with traceback
            "onnxscript.version_converter",
            "onnxscript.version_converter._version_converter",
        )
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # The exporter uses what torch.utils._pytree has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # Several inputs with one dynamic batch share its name, which is meant.
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refuse_training(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            f"{type(model).__name__} is in training mode, and the file would hold what one training step "
            f"computes. Call .eval() first."
        )


def inputs_of(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """What an ONNX file takes, once ``onnx.checker`` has found the file valid.

    Args:
        path: The file.

    Returns:
        Input names to sizes (``None`` where free) and the dtype's name (``"float32"``).

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: It is no valid ONNX file.
    """
    (onnx,) = _require("onnx")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    try:
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # types of its own, and those of protobuf, directly under Exception
        raise ValueError(f"{path} is not a valid ONNX model: {error}") from error
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = {}
    for value in graph.input:
        if value.name not in initializers:
            tensor = value.type.tensor_type
            sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            inputs[value.name] = (sizes, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return inputs


def _as_list(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, list) else [inputs]


def _require(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"specnorm_fx.onnx needs {error.name}: pip install 'specnorm-fx[onnx]'.") from error


class Weight(NamedTuple):
    """A weight in an ONNX file."""

    name: str
    array: np.ndarray
    dim: int


# Which dimension of the weight is the output's, by the operator that takes it as its second input.
OUTPUT_DIMS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


def weights_of(path: str | os.PathLike[str]) -> tuple[list[Weight], dict[str, str]]:
    """The weights of the layers in an ONNX file, and its metadata.

    Args:
        path: The file, its external data beside it.

    Returns:
        The initializers that a Conv, ConvTranspose, Gemm or MatMul takes as its weight, or a Gather as its
        table, in the order of use; and ``metadata_props``.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        OSError: The file, or its external data, cannot be read.
        ValueError: It is no ONNX file.
    """
    (onnx,) = _require("onnx")
    try:
        model = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's own types, and those of onnx
        raise ValueError(f"{path} is damaged or no ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path} is damaged or no ONNX file: it has no nodes.")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, Weight] = {}
    for node in model.graph.node:
        place, dim = (0, 0) if node.op_type == "Gather" else (1, OUTPUT_DIMS.get(node.op_type))
        if node.op_type == "Gemm":
            dim = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        name = node.input[place] if len(node.input) > place else ""
        if dim is None or name not in initializers or name in found:
            continue
        array = onnx.numpy_helper.to_array(initializers[name])
        if array.ndim > 1 and array.dtype.kind in "fc":
            found[name] = Weight(name, array.copy(), dim)
    return list(found.values()), {entry.key: entry.value for entry in model.metadata_props}
