"""The command ``specnorm-fx``: what is said on the command line, handed to the library.

What a command finds goes to stdout, all else to stderr: what the user's model prints, warnings, progress,
and an error, in one line. Exit codes: 0 done; 1 an ONNX file does not compute what the model does; 2 an
error that the user can mend, with nothing written.
"""

import argparse
import contextlib
import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import specnorm_fx
from specnorm_fx.atomic import replaced
from specnorm_fx.checkpoint import LAYOUTS, find_weights
from specnorm_fx.graph_module import SpectralNormGraphModule
from specnorm_fx.inputs import (
    DTYPES,
    Input,
    calibration_batches,
    example_inputs,
    file_inputs,
    one_row_more,
    program_inputs,
    try_inputs,
)
from specnorm_fx.load import (
    LoadError,
    brief,
    build_model,
    is_program,
    load_model,
    read_checkpoint,
    sha256,
    write_checkpoint,
)
from specnorm_fx.onnx import VerificationError
from specnorm_fx.onnx.precision import PRECISIONS

__all__ = ["main"]

DONE, DIFFERENCE, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
PROGRESS_AFTER = 2.0  # seconds

PARTS = """\
MODEL is package.module:factory (found from the current folder, too), path/to/file.py:factory, or a .pt2 file
of torch.export.save. It is code, and runs. A checkpoint is data: only tensors are read from it.
"""
EXPORT = """\
examples:
  specnorm-fx export nets.py:Discriminator --kwargs '{"channels": 64}' --checkpoint disc.pt \\
      --input 1x3x64x64 --dynamic-batch -o disc.onnx
  specnorm-fx export nets.py:Projection --checkpoint disc.safetensors --input image=1x3x64x64 \\
      --input label=1:int64 --axes image=0:batch --axes label=0:batch -o disc.onnx
  specnorm-fx export disc.pt2 -o disc.onnx --precision int8 --calibration images.npy
"""
VERIFY = """\
examples:
  specnorm-fx verify disc.onnx --model nets.py:Discriminator --checkpoint disc.pt --batches 10
  specnorm-fx verify disc.onnx --model disc.pt2 --rtol 1e-4 --json
  specnorm-fx verify int8.onnx --model disc.pt2 --data images.npy
"""
INSPECT = """\
examples:
  specnorm-fx inspect disc.onnx --html disc.html
  specnorm-fx inspect disc.pt --json
  specnorm-fx inspect nets.py:Discriminator --checkpoint disc.pt --plot spectra.png
"""
CONVERT = """\
examples:
  specnorm-fx convert disc.pt for_torch.pt --to parametrizations
  specnorm-fx convert disc.pt disc.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program name; ``None`` takes those of the process.

    Returns:
        The exit code.
    """
    try:
        args = _parser().parse_args(argv)
        torch.manual_seed(0)  # the same command writes the same file, also where u and v start at random
        with contextlib.redirect_stdout(sys.stderr), _progress(args.command), warnings.catch_warnings():
            # torch 2.13, on a copy of what torch.export has made.
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            result = args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except VerificationError as error:
        return _fail(error, DIFFERENCE)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, USER_ERROR)
    print(result)
    return DONE


def _fail(error: Exception, code: int) -> int:
    print("specnorm-fx: error:", " ".join(str(error).split()), file=sys.stderr)
    return code


# --- Commands: each returns what goes to stdout ----------------------------------------------------


def _export(args: argparse.Namespace) -> str:
    model = _trained(args)
    if args.input:
        example = example_inputs(model, args.input)
    elif is_program(args.model):
        example = program_inputs(args.model)
    else:
        raise LoadError(f"--input must give the shape of a batch for {args.model}, such as 1x3x64x64.")
    if args.dynamic_batch:  # the exporter fixes a size that the model has fixed, without a word
        try_inputs(model, one_row_more(example))
    source = args.checkpoint or args.model
    _refuse_replacing("--output", args.output, args.checkpoint, args.model)
    try:
        verification = specnorm_fx.onnx.export(
            model,
            example,
            args.output,
            dynamic_batch=args.dynamic_batch,
            axes=args.axes,
            input_names=args.input_names,
            output_names=args.output_names,
            opset_version=args.opset,
            n_batches=args.batches,
            rtol=args.rtol,
            precision=args.precision,
            calibration=calibration_batches(args.calibration, example) if args.calibration else None,
            external_data=args.external_data,
            metadata={"source_checkpoint_sha256": sha256(source)},
        )
    except OSError as error:
        # The library's own says all; one of Python's, on a full disk, not even which file.
        raise (
            error if error.errno is None else LoadError(f"{args.output} cannot be written: {error}.")
        ) from error
    except (VerificationError, ValueError, ImportError):
        raise
    except Exception as error:  # torch.onnx raises errors of many kinds
        raise LoadError(
            f"The model cannot be exported to ONNX ({brief(error)}). Check the operators of its forward, and "
            f"--opset."
        ) from error
    divided = f"Divided by sigma: {', '.join(site.fqn for site in model.sites())}\n"
    return str(verification.to_json() if args.json else f"{divided}{verification}")


def _verify(args: argparse.Namespace) -> str:
    taken = specnorm_fx.onnx.inputs_of(args.file)  # a file that is no ONNX is an error, and not a difference
    model = _trained(args)
    if args.data:
        example = example_inputs(model, args.input or file_inputs(taken, 1))
        batches = calibration_batches(args.data, example)[: args.batches]
    else:
        sizes = range(1, args.batches + 1)
        batches = [example_inputs(model, args.input or file_inputs(taken, size)) for size in sizes]
    try:
        verification = specnorm_fx.onnx.verify(args.file, model, batches, rtol=args.rtol, structure=True)
    except VerificationError:
        raise
    except RuntimeError as error:  # the exporter, which makes the file to compare with
        raise LoadError(f"The operators cannot be compared ({brief(error)}).") from error
    if args.json:
        return str(verification.to_json())
    errors = ", ".join(f"{decade}: {count}" for decade, count in verification.histogram.items())
    same = "operators: those of the model without spectral norm"
    return f"{verification}\nrelative errors by decade: {errors}\n{same}"


def _inspect(args: argparse.Namespace) -> str:
    from specnorm_fx import inspection

    for option, written in (("--plot", args.plot), ("--html", args.html)):
        _refuse_replacing(option, written, args.checkpoint, args.target)
    if args.plot and args.html and args.plot.resolve() == args.html.resolve():
        raise LoadError(f"--plot and --html must be two files, got {args.plot} for both.")
    is_onnx = args.target.endswith(".onnx")
    is_model = is_program(args.target) or (":" in args.target and not Path(args.target).exists())
    if not is_model and (args.checkpoint or args.select or args.kwargs):
        raise LoadError(f"--checkpoint, --select and --kwargs are for a MODEL, and {args.target} is none.")
    if is_onnx:
        found = inspection.inspect_onnx(args.target)
    elif is_model:
        # Without weights or a selection to put on it the model is shown as its factory gives it.
        as_it_is = args.checkpoint is None and args.select is None and not is_program(args.target)
        model = build_model(args.target, args.kwargs) if as_it_is else _load(args, args.target)
        try:
            found = inspection.inspect_model(model)
        except TypeError as error:  # a kind of module that transform does not take
            raise LoadError(brief(error)) from error
    else:
        found = inspection.inspect_checkpoint(args.target)
    with contextlib.ExitStack() as both:  # of the two files both, or none
        if args.plot:
            found.plot(both.enter_context(replaced(args.plot)))
        if args.html:
            found.html(both.enter_context(replaced(args.html)))
    return str(found.to_json() if args.json else found)


def _convert(args: argparse.Namespace) -> str:
    state_dict = read_checkpoint(args.source)
    if args.to is not None:
        state_dict = specnorm_fx.convert_state_dict(state_dict, to=args.to)
    write_checkpoint(state_dict, args.target)
    weights = [fqn for fqn, _ in find_weights(state_dict)]
    if args.json:
        return json.dumps({"path": str(args.target), "tensors": len(state_dict), "with_u_and_v": weights})
    return f"{args.target}: {len(state_dict)} entries, u and v for {', '.join(weights) or 'no weight'}"


def _refuse_replacing(option: str, written: Path | None, checkpoint: Path | None, model: str) -> None:
    """What comes out must not take the place of what it is made from."""
    for read in (checkpoint, Path(model), Path(model.partition(":")[0])):
        if written and read and written.exists() and read.exists() and written.samefile(read):
            raise LoadError(f"{option} must be another file than {read}, which the model comes from.")


def _trained(args: argparse.Namespace) -> SpectralNormGraphModule:
    if args.checkpoint is None and not is_program(args.model):
        raise LoadError(f"--checkpoint must be given for {args.model}, which has no trained weights.")
    return _load(args, args.model)


def _load(args: argparse.Namespace, spec: str) -> SpectralNormGraphModule:
    return load_model(spec, args.kwargs, args.checkpoint, args.select)


@contextlib.contextmanager
def _progress(command: str) -> Iterator[None]:
    """A line on stderr about work that takes long, counting seconds on a terminal."""
    stderr, start, done = sys.stderr, time.monotonic(), threading.Event()

    def show() -> None:
        if done.wait(PROGRESS_AFTER):
            return
        if not stderr.isatty():
            print(f"specnorm-fx: {command} ...", file=stderr, flush=True)
            return
        while True:
            seconds = time.monotonic() - start
            print(f"\rspecnorm-fx: {command} ... {seconds:.0f} s", end="", file=stderr, flush=True)
            if done.wait(1):
                print("\r\x1b[K", end="", file=stderr, flush=True)
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- Command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are reported by `main`, like all others."""

    def error(self, message: str) -> NoReturn:
        raise LoadError(f"{message}; see {self.prog} --help")


class _Merged(argparse.Action):
    """What is said of an input in several places, put together."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, axes = values
        merged: dict[str, dict[int, str | None]] = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, merged | {name: merged.get(name, {}) | axes})


def _input(text: str) -> Input:
    found = re.fullmatch(r"(?:([^=:]+)=)?([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text)
    if not found or (found[3] or "float32") not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give sizes above 0 such as 1x3x64x64, the batch first, or "
            f"name=1x10:int64 (dtypes: {', '.join(DTYPES)})"
        )
    return Input(found[1], tuple(map(int, found[2].split("x"))), DTYPES[found[3]] if found[3] else None)


def _axes(text: str) -> tuple[str, dict[int, str | None]]:
    if not re.fullmatch(r"[^=]+=\d+(:\w+)?(,\d+(:\w+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} does not name axes; give such as image=0:batch,2:height")
    name, _, axes = text.partition("=")
    pairs = (axis.partition(":") for axis in axes.split(","))
    return name, {int(number): axis or None for number, _, axis in pairs}


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


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _names(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="specnorm-fx",
        description="From the checkpoint of a spectrally normalised model to a verified ONNX file.",
        epilog=f"specnorm-fx COMMAND --help has examples.\n\n{PARTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _command(commands, "export", _export, "write a verified ONNX file", EXPORT)
    add("model", metavar="MODEL")
    _model_arguments(add)
    _input_arguments(add)
    add("-o", "--output", type=Path, required=True, metavar="F.onnx", help="the file to write")
    add("--dynamic-batch", action="store_true", help="leave the first size of every input free")
    add("--axes", type=_axes, action=_Merged, help="sizes left free, as image=0:batch,2:height")
    add("--opset", type=int, metavar="N", help="ONNX opset (default: the exporter's)")
    add("--input-names", type=_names, metavar="A,B", help="names of the file's inputs")
    add("--output-names", type=_names, metavar="A,B", help="names of the file's outputs")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="what it computes in")
    add("--calibration", type=Path, metavar="PATH", help="for int8: inputs, .npy or a folder of them")
    add(
        "--external-data",
        action="store_true",
        default=None,
        help="weights in a file beside (default: > 1.5 GiB)",
    )

    add = _command(
        commands, "verify", _verify, "compare an ONNX file with the model that it was made of", VERIFY
    )
    add("file", metavar="F.onnx")
    add("--model", required=True, metavar="MODEL")
    _model_arguments(add)
    _input_arguments(add)
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="compare on these, .npy or a folder of them",
    )

    add = _command(commands, "inspect", _inspect, "show the singular values of every weight", INSPECT)
    add("target", metavar="MODEL|CHECKPOINT|F.onnx")
    _model_arguments(add)
    add("--plot", type=Path, metavar="F.png", help="a picture of sigma and the singular values")
    add("--html", type=Path, metavar="F.html", help="a page with table and picture, in one file")

    add = _command(commands, "convert", _convert, "write a checkpoint in another layout or format", CONVERT)
    add("source", type=Path, metavar="IN")
    add("target", type=Path, metavar="OUT", help="by its suffix .safetensors, else for torch.load")
    add("--to", choices=LAYOUTS, help="the layout (default: as it is)")
    return parser


def _command(commands: Any, name: str, run: Any, about: str, examples: str) -> Any:
    """Add a command, and give the function that adds its arguments."""
    sub = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"{examples}\n{PARTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    return sub.add_argument


def _model_arguments(add: Any) -> None:
    add("--kwargs", type=_keyword_arguments, default={}, help="arguments of the factory, a JSON object")
    add("--checkpoint", type=Path, metavar="F", help="weights: from torch.save, or .safetensors")
    add("--select", action="append", help="glob or re:... on modules or weights; can be repeated")


def _input_arguments(add: Any) -> None:
    shape = "shape, as 1x3x64x64 or name=1x10:int64; one for each input"
    add("--input", type=_input, action="append", metavar="SHAPE", help=shape)
    add("--batches", type=_count, default=3, metavar="N", help="random batches to compare (default: 3)")
    add("--rtol", type=float, help="largest difference, relative to the largest output")
