"""Turn the checkpoint of a spectrally normalised discriminator into a verified ONNX file.

    python export/export_discriminator.py --model package.module:factory --checkpoint disc.pt
                                          --input 1x3x64x64 -o disc.onnx
                                          [--kwargs '{"channels": 64}'] [--select 'blocks.*']...
                                          [--dynamic-batch] [--opset N]

Needs specnorm_fx with its extra `onnx`. The steps, each a function of the library:

1. The model is built by the factory, from a module that can be imported here or from a .py file.
2. The checkpoint is read, as tensors only: a state dict, or a dict that holds one under
   "state_dict" or "model". The prefixes of DDP and torch.compile are taken off its keys.
3. Spectral norm is put on the weights that the checkpoint names as normalised, in any of the
   layouts of `specnorm_fx.convert_state_dict`. A plain checkpoint names none: then u and v
   converge anew for the weights of all Linear, Conv and ConvTranspose layers. --select, which can
   be repeated, chooses the weights in place of either. What the factory's model itself carries of
   torch's spectral norm is taken over with its options.
4. The checkpoint is loaded; every key has to fit.
5. The file is written with the weights W / sigma, and verified against the model.

An error prints one line on stderr, writes no file, and gives exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import operator
import os
import pickle
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

import specnorm_fx
from specnorm_fx.checkpoint import LAYOUTS, keys_of

StateDict = dict[str, Any]

NESTED = ("state_dict", "model")  # where a training checkpoint keeps the state dict
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before every key
QUOTED = 600  # characters of another's message: a state dict that does not fit may name thousands of keys
SAVE_IT = "Save the discriminator by torch.save(model.state_dict(), path)."


class ExportError(Exception):
    """What the user can mend; the message says how."""


def _brief(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", QUOTED, placeholder=" ...")


# --- Model ---------------------------------------------------------------------------------------


def build_model(spec: str, kwargs: dict[str, Any]) -> nn.Module:
    """Call the factory.

    Args:
        spec: ``package.module:factory`` or ``path/to/file.py:factory``.
        kwargs: Its keyword arguments.

    Returns:
        The model, untrained.

    Raises:
        ExportError: There is no such factory, or it gives no model.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ExportError(f"--model {spec!r} is not of the form package.module:factory or file.py:factory")
    module = import_source(source)
    try:
        factory: Callable[..., Any] = operator.attrgetter(name)(module)
    except AttributeError as error:
        names = ", ".join(name for name in vars(module) if not name.startswith("_")) or "none"
        raise ExportError(f"{source} has no {name!r}; the names in it are: {names}") from error
    try:
        model = factory(**kwargs)
    except Exception as error:  # it is the user's code
        raise ExportError(
            f"{spec} called with {kwargs} failed ({_brief(error)}); give the arguments of the trained model "
            f"by --kwargs"
        ) from error
    if not isinstance(model, nn.Module):
        raise ExportError(f"{spec} gives a {type(model).__name__}; it must give a torch.nn.Module")
    return model


def import_source(source: str) -> ModuleType:
    """Import a module by its name, seen from the current folder, or by the path of its file."""
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ExportError(f"--model {source}: no such file")
    # As `python file.py` and `python -m module` do, so that what they import is found.
    sys.path.insert(0, str(path.resolve().parent) if is_file else os.getcwd())
    try:
        return _import_file(path) if is_file else importlib.import_module(source)
    except Exception as error:  # it is the user's code
        raise ExportError(
            f"--model {source} cannot be imported ({_brief(error)}); name a .py file, or a module that "
            f"Python finds from the current folder"
        ) from error


def _import_file(path: Path) -> ModuleType:
    # Not under the bare stem, which may be that of a module in use (torch.py, model.py).
    spec: Any = importlib.util.spec_from_file_location(f"_factory_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # torch looks classes up by their module
    spec.loader.exec_module(module)
    return module


# --- Checkpoint ----------------------------------------------------------------------------------


def read_state_dict(path: Path, model: nn.Module) -> StateDict:
    """Read the state dict of a checkpoint, without what wrappers put before its keys.

    Args:
        path: From ``torch.save``.
        model: The model it is for.

    Returns:
        A state dict on the CPU.

    Raises:
        ExportError: The file cannot be read, holds more than tensors, or holds no state dict.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ExportError(f"the checkpoint cannot be read: {error}") from error
    with file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ExportError(
                f"{path} holds other objects than tensors, or is no checkpoint; it is refused, since "
                f"unpickling objects can run any code. {SAVE_IT}"
            ) from error
        except Exception as error:  # of many kinds, for a file that is cut off or damaged
            raise ExportError(f"{path} is damaged or no checkpoint ({_brief(error)}). {SAVE_IT}") from error
    state_dict = next((loaded[key] for key in NESTED if _is_mapping(loaded, key)), loaded)
    if not _is_state_dict(state_dict):
        what = (
            f"a dict of {', '.join(map(str, loaded))}" if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise ExportError(
            f"{path} holds {what}, not a state dict, and none under {' or '.join(map(repr, NESTED))}. "
            f"{SAVE_IT}"
        )
    return strip_wrappers(dict(state_dict), model)


def _is_mapping(loaded: Any, key: str) -> bool:
    return isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)


def _is_state_dict(candidate: Any) -> bool:
    """Names with a tensor among their values; a value may be extra state of any kind."""
    return (
        isinstance(candidate, Mapping)
        and all(isinstance(key, str) for key in candidate)
        and any(isinstance(value, torch.Tensor) for value in candidate.values())
    )


def strip_wrappers(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Take off the prefixes that all keys have and the model's do not, outermost first."""
    own = model.state_dict().keys()
    for prefix in WRAPPERS:
        own_too = all(key.startswith(prefix) for key in own)
        if not own_too and all(key.startswith(prefix) for key in state_dict):
            unwrapped = {key.removeprefix(prefix): value for key, value in state_dict.items()}
            return strip_wrappers(unwrapped, model)
    return state_dict


def normalized_weights(state_dict: StateDict) -> list[str]:
    """The FQNs of the weights for which a state dict has spectral norm, in its order."""
    plain = specnorm_fx.convert_state_dict(state_dict, to="plain")
    vectors = state_dict.keys() - plain.keys()
    return [fqn for fqn in plain if any(keys_of(fqn, layout).u in vectors for layout in LAYOUTS)]


# --- Export --------------------------------------------------------------------------------------


def normalize(model: nn.Module, state_dict: StateDict, select: list[str] | None) -> fx.GraphModule:
    """Put spectral norm on the model and load the state dict; says on stdout what was done.

    Args:
        model: From the factory.
        state_dict: In any layout.
        select: Patterns, or ``None`` for what the state dict says.

    Returns:
        The transformed model in eval mode.

    Raises:
        ExportError: The selection, the model and the state dict do not fit each other.
    """
    named = normalized_weights(state_dict)
    if select is None and named:
        select = [escape(fqn) for fqn in named]
    try:
        transformed = specnorm_fx.transform(model, select)
    except (TypeError, ValueError, IndexError, TraceError) as error:
        raise ExportError(f"spectral norm cannot be put on the model: {error}") from error
    try:
        transformed.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ExportError(
            f"the checkpoint does not fit the model ({_brief(error)}); check --model, --kwargs and --select"
        ) from error
    if not named:
        print("The checkpoint is plain: its weights are normalised here, and u and v converge anew.")
    print(f"Divided by sigma: {', '.join(specnorm_fx.sigmas(transformed))}")
    return transformed.eval()


def example_of(shape: tuple[int, ...], model: fx.GraphModule) -> torch.Tensor:
    """A random input in the dtype of the model, tried out on it."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    example = torch.randn(shape, dtype=dtype)
    interpreter = fx.Interpreter(model)  # the model itself, called, would print a traceback
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(example)
    except Exception as error:  # it is the user's code
        size = "x".join(map(str, shape))
        raise ExportError(
            f"the model does not run on an input of {size} ({_brief(error)}); give the shape of a training "
            f"batch by --input"
        ) from error
    return example


def export(args: argparse.Namespace) -> None:
    """The steps, from the command line to the file."""
    torch.manual_seed(0)  # the same command writes the same file, also where u and v start at random
    model = build_model(args.model, args.kwargs)
    state_dict = read_state_dict(args.checkpoint, model)
    transformed = normalize(model, state_dict, args.select)
    example = example_of(args.input, transformed)
    try:
        verification = specnorm_fx.onnx.export(
            transformed, example, args.output, dynamic_batch=args.dynamic_batch, opset_version=args.opset
        )
    except (OSError, ImportError) as error:
        raise ExportError(str(error)) from error
    except specnorm_fx.onnx.VerificationError as error:
        raise ExportError(
            f"no file was written, since it would not compute what the model does ({_brief(error)}); check "
            f"that the weights of the checkpoint are finite, or try another --opset"
        ) from error
    except Exception as error:  # torch.onnx raises errors of many kinds
        raise ExportError(
            f"the model cannot be exported to ONNX ({_brief(error)}); check the operators of its forward, "
            f"and --opset"
        ) from error
    print(verification)


# --- Command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are reported by `main`, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ExportError(f"{message}; see export_discriminator.py --help")


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give sizes above 0 such as 1x3x64x64, the batch first"
        )
    return tuple(map(int, text.split("x")))


def _keyword_arguments(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); quote it as '{{\"channels\": 64}}'"
        ) from error
    if not isinstance(kwargs, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"channels\": 64}}'")
    return kwargs


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="export_discriminator.py",
        description="Turn the checkpoint of a spectrally normalised discriminator into a verified ONNX file.",
    )
    add = parser.add_argument
    add("--model", required=True, help="package.module:factory or path/to/file.py:factory")
    add("--kwargs", type=_keyword_arguments, default={}, help="arguments of the factory, a JSON object")
    add("--checkpoint", type=Path, required=True, help="state dict, or a dict that holds one")
    add("--input", type=_shape, required=True, help="shape of the input, as 1x3x64x64")
    add("-o", "--output", type=Path, required=True, help="ONNX file to write")
    add("--select", action="append", help="glob or re:... on names of modules or weights; can be repeated")
    add("--dynamic-batch", action="store_true", help="leave the batch size free")
    add("--opset", type=int, help="ONNX opset (default: the exporter's)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; ``None`` takes those of the process.

    Returns:
        The exit code: 0, or 2 after an error.
    """
    try:
        export(_parse(argv))
    except ExportError as error:
        print("export_discriminator.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
