"""From names to a transformed model: factories, programs and checkpoint files.

A model is code that its user chooses. A checkpoint is data from anywhere: only tensors are read from it,
and nothing in it runs.
"""

import hashlib
import importlib
import importlib.util
import logging
import operator
import os
import pickle
import re
import sys
import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from specnorm_fx.atomic import replaced
from specnorm_fx.checkpoint import convert_state_dict, find_weights
from specnorm_fx.graph_module import SpectralNormGraphModule
from specnorm_fx.passes import transform

__all__ = [
    "LoadError",
    "brief",
    "build_model",
    "is_program",
    "load_model",
    "read_checkpoint",
    "read_program",
    "sha256",
    "strip_wrappers",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

NESTED = ("state_dict", "model")  # where a training checkpoint keeps the state dict
WRAPPED = "module."  # what DDP and AveragedModel put before every key
AVERAGES = "n_averaged"  # what AveragedModel keeps beside
COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # what torch.compile puts before those of what it compiles
QUOTED = 600  # characters of another's message: a state dict that does not fit may name thousands of keys
SAVE_IT_AS_PROGRAM = "Save the model as it is before transform: torch.export.save(program, 'model.pt2')."
SAVE_IT = "Save the state dict alone: torch.save(model.state_dict(), path)."


class LoadError(ValueError):
    """What the user can mend; the message is one line that says how."""


def brief(error: Exception) -> str:
    """An error of another's code in one line.

    Args:
        error: Its message may be of any length.
    """
    return textwrap.shorten(f"{type(error).__name__}: {error}", QUOTED, placeholder=" ...")


# --- Models --------------------------------------------------------------------------------------


def build_model(spec: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Call a factory, or read a program.

    Args:
        spec: ``package.module:factory`` (found from the current folder, too), ``path/to/file.py:factory``,
            or the path of a ``.pt2`` file from ``torch.export.save``. Either is code, which runs here.
        kwargs: The factory's keyword arguments.

    Returns:
        The model as the factory has made it; for a program its ``module()``.

    Raises:
        LoadError: There is no such factory or file, it fails, or it gives no model.
    """
    if is_program(spec):
        if kwargs:
            raise LoadError(f"kwargs are for a factory, and {spec} is a program: leave them out.")
        return read_program(spec).module()
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise LoadError(
            f"The model must be package.module:factory, file.py:factory or a .pt2 file, got {spec!r}."
        )
    module = _import_source(source)
    try:
        factory = operator.attrgetter(name)(module)
    except AttributeError as error:
        names = ", ".join(name for name in vars(module) if not name.startswith("_")) or "none"
        raise LoadError(f"{source} has no {name!r}; the names in it are: {names}.") from error
    try:
        model = factory(**kwargs)
    except (Exception, SystemExit) as error:  # it is the user's code
        raise LoadError(
            f"{spec} called with {dict(kwargs)} failed ({_what(error)}). Give the arguments of the trained "
            f"model as kwargs."
        ) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} must give a torch.nn.Module, got a {type(model).__name__}.")
    return model


def is_program(spec: str) -> bool:
    """Whether the model is a file of ``torch.export.save``.

    Args:
        spec: As in `build_model`.
    """
    return spec.endswith(".pt2")


def read_program(spec: str) -> torch.export.ExportedProgram:
    """Read a file of ``torch.export.save``.

    Args:
        spec: The ``.pt2`` file. It is code, as a factory is: torch unpickles parts of it.

    Raises:
        LoadError: There is no such file, or it is damaged.
    """
    if not Path(spec).is_file():
        raise LoadError(f"There is no program {spec}.")
    log = logging.getLogger("torch.export")  # a traceback goes there before the error
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return torch.export.load(spec)
    except Exception as error:  # of many kinds, for a file that is damaged
        raise LoadError(
            f"{spec} is damaged or no program of a plain model ({brief(error)}). {SAVE_IT_AS_PROGRAM}"
        ) from error
    finally:
        log.setLevel(level)


def _import_source(source: str) -> ModuleType:
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise LoadError(f"There is no file {source} to take the model from.")
    # As `python file.py` and `python -m module` do, so that what they import is found.
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _import_file(path) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # it is the user's code
        raise LoadError(
            f"{source} cannot be imported ({_what(error)}). Name a .py file, or a module that Python finds "
            f"from the current folder."
        ) from error


def _import_file(path: Path) -> ModuleType:
    # Not under the bare stem, which may be that of a module in use (torch.py, model.py), or of another file.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec: Any = importlib.util.spec_from_file_location(f"_factory_of_{path.stem}_{place}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # torch looks classes up by their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _what(error: BaseException) -> str:
    return brief(error) if isinstance(error, Exception) else f"it calls sys.exit({error})"


# --- Checkpoints ---------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in a file, of which nothing but tensors is read.

    Args:
        path: From ``torch.save``: a state dict, or a dict that holds one under ``"state_dict"`` or
            ``"model"``; or a ``.safetensors`` file.

    Returns:
        The state dict, in the layout that it has, on the CPU.

    Raises:
        LoadError: The file cannot be read, holds other objects than tensors, or no state dict.
        ImportError: It is a ``.safetensors`` file, and the extra ``safetensors`` is not installed.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise LoadError(
            f"The checkpoint {path} cannot be read: {error.strerror}. Give the path of a file."
        ) from error
    with file:
        loaded = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path, file)
    state_dict: dict[str, Any] = next((loaded[key] for key in NESTED if _is_mapping(loaded, key)), loaded)
    if not _is_state_dict(state_dict):
        got = type(loaded).__name__
        if isinstance(loaded, dict):
            got = textwrap.shorten(f"a dict of {', '.join(map(str, loaded)) or 'nothing'}", QUOTED)
        where = " or ".join(map(repr, NESTED))
        raise LoadError(f"{path} must hold a state dict, itself or under {where}, got {got}. {SAVE_IT}")
    return state_dict


def _read_pickle(path: Path, file: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # About TorchScript, or a pickle protocol; the error after it says more.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{path} holds other objects than tensors, or is no checkpoint. It is refused, since unpickling "
            f"objects can run any code. {SAVE_IT}"
        ) from error
    except Exception as error:  # of many kinds, for a file that is cut off or damaged
        raise LoadError(f"{path} is damaged or no checkpoint ({brief(error)}). {SAVE_IT}") from error


def _read_safetensors(path: Path) -> Any:
    safetensors = _require_safetensors()
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the library's own type, and those of torch
        raise LoadError(f"{path} is damaged or no safetensors file ({brief(error)}).") from error


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _require_safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "A .safetensors file needs safetensors: pip install 'specnorm-fx[safetensors]'."
        ) from error


def _is_mapping(loaded: Any, key: str) -> bool:
    return isinstance(loaded, dict) and isinstance(loaded.get(key), dict)


def _is_state_dict(candidate: Any) -> bool:
    """Names with a tensor among their values, and no further state dict but extra state, of any kind."""
    return (
        isinstance(candidate, dict)
        and all(isinstance(key, str) for key in candidate)
        and any(isinstance(value, Tensor) for value in candidate.values())
        and not any(
            _is_state_dict(value)
            for key, value in candidate.items()
            if not key.endswith(torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX)
        )
    )


def write_checkpoint(state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict, so that the file is whole or is what it was before.

    Args:
        state_dict: Names to tensors.
        path: A ``.safetensors`` file, or any other for ``torch.save``; an existing one is replaced.

    Raises:
        LoadError: A value is no dense tensor, or too large, and the file is to be ``.safetensors``.
        ImportError: The extra ``safetensors`` is not installed, and the file is to be one.
        OSError: ``path`` cannot be written.
    """
    path = Path(path)
    if _is_safetensors(path):
        safetensors = _require_safetensors()
        whole = {key: _whole(key, value) for key, value in state_dict.items()}
    with replaced(path) as written:
        try:
            with written.open("wb") as written_file:  # by its path, torch would raise a RuntimeError
                if _is_safetensors(path):
                    written_file.write(safetensors.save(whole, metadata={"format": "pt"}))
                else:
                    torch.save(state_dict, written_file)
        except OSError as error:
            raise type(error)(
                f"{path} cannot be written: {error.strerror or error}. Nothing was left behind."
            ) from error


def _whole(key: str, value: Any) -> Tensor:
    """A value of a state dict as safetensors has it: tied weights, and views, each a tensor of its own."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        got = type(value).__name__ if not isinstance(value, Tensor) else "sparse one, or one without values"
        raise LoadError(
            f"A .safetensors file must hold dense tensors alone, got a {got} under {key!r}. Write a .pt file."
        )
    try:
        return value.detach().clone(memory_format=torch.contiguous_format)
    except RuntimeError as error:  # one element, many times, may be any number of them
        raise LoadError(f"{key!r} is too large to be written ({brief(error)}).") from error


def strip_wrappers(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Take off what DDP, ``AveragedModel`` and ``torch.compile`` put into names, and the model's do not have.

    Args:
        state_dict: Any layout.
        model: The model it is for.

    Returns:
        A new dict.
    """
    own = model.state_dict().keys()
    found = dict(state_dict)
    if AVERAGES not in own:
        found.pop(AVERAGES, None)
    if not any(COMPILED.search(key) for key in own):  # around the model, or a part of it
        found = {COMPILED.sub("", key): value for key, value in found.items()}
    while _are_wrapped(found) and not _are_wrapped(own):
        found = {key.removeprefix(WRAPPED): value for key, value in found.items()}
    return found


def _are_wrapped(names: Collection[str]) -> bool:
    return bool(names) and all(name.startswith(WRAPPED) for name in names)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


# --- The transformed model -----------------------------------------------------------------------


def load_model(
    spec: str,
    kwargs: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None = None,
    select: Sequence[str] | None = None,
) -> SpectralNormGraphModule:
    """Build a model, put spectral norm on it, and load a checkpoint.

    Normalised is what ``select`` says; else the weights for which the checkpoint has u and v; else, with
    a warning in the log, what `specnorm_fx.transform` takes by default, where u and v converge anew.

    Args:
        spec: As in `build_model`.
        kwargs: As there.
        checkpoint: As in `read_checkpoint`, of any layout, also from DDP, ``AveragedModel`` or
            ``torch.compile``. ``None``: the weights that the model comes with.
        select: Globs, or ``"re:..."``.

    Returns:
        The transformed model in eval mode.

    Raises:
        LoadError: The model, the checkpoint and the selection do not fit each other, or a weight
            is not finite.
        ImportError: As in `read_checkpoint`.
    """
    model = build_model(spec, kwargs)
    loaded = model.state_dict() if checkpoint is None else read_checkpoint(checkpoint)
    state_dict = strip_wrappers(loaded, model)
    named = [fqn for fqn, _ in find_weights(state_dict)]
    own = convert_state_dict(model.state_dict(), to="plain")
    if foreign := [fqn for fqn in named if fqn not in own]:
        raise LoadError(
            f"{checkpoint} has spectral norm for {foreign[0]}, and the model has no such parameter, but "
            f"{textwrap.shorten(', '.join(own), QUOTED)}. Check the model, and what stands before the names."
        )
    if named and not select and checkpoint is not None:
        select = [escape(fqn) for fqn in named]
    try:
        transformed = transform(model, select)  # a model's own spectral norm it finds, or refuses, by itself
    except TraceError as error:
        raise LoadError(
            f"Spectral norm cannot be put on the model: {error} Or give a program. {SAVE_IT_AS_PROGRAM}"
        ) from error
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise LoadError(f"Spectral norm cannot be put on the model: {error}") from error
    if checkpoint is not None:
        _load_(transformed, state_dict, Path(checkpoint))
    _refuse_not_finite(transformed, spec if checkpoint is None else str(checkpoint))
    if not named:
        fqns = ", ".join(site.fqn for site in transformed.sites())
        logger.warning("There were no u and v to load, so these weights are normalised anew: %s.", fqns)
    try:
        transformed.eval()
    except RuntimeError as error:  # a program of a model in training mode
        raise LoadError(str(error)) from error
    return transformed


def _load_(model: SpectralNormGraphModule, state_dict: dict[str, Any], path: Path) -> None:
    own = model.state_dict()
    for fqn, value in convert_state_dict(state_dict, to="plain").items():
        # PyTorch would turn integers into floats, in silence.
        if isinstance(value, Tensor) and fqn in own and _kind(value) != _kind(own[fqn]):
            raise LoadError(
                f"{fqn} must be {_kind(own[fqn])} as in the model, got {value.dtype} in {path}. Give the "
                f"checkpoint of this model."
            )
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise LoadError(
            f"{path} does not fit the model ({brief(error)}). Check the model, its arguments, and what is "
            f"selected."
        ) from error


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating point" if tensor.is_floating_point() else "integer"


def _refuse_not_finite(model: SpectralNormGraphModule, source: str) -> None:
    vectors = ((f"{site.fqn}_{name}", getattr(site, name)) for site in model.sites() for name in ("u", "v"))
    for fqn, tensor in [*model.named_parameters(), *vectors]:
        if not tensor.isfinite().all():
            raise LoadError(f"{fqn} must be finite, got NaN or inf in {source}. Take an earlier checkpoint.")
