"""A look at sigma: `sigmas` for logging in training, `report` for everything about every weight."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from specnorm_fx import capture, reference, sharded
from specnorm_fx.graph_module import sites_of, transformed

__all__ = ["Report", "Row", "Sigma", "SigmaLogger", "report", "sigmas", "skipped_weights", "table"]


class Sigma(NamedTuple):
    """A sigma with its error bar, from ``sigmas(model, residual=True)``.

    Attributes:
        sigma: As without.
        residual: See `specnorm_fx.reference.residual`: some singular value of the weight lies within
            ``residual * sigma`` of ``sigma``.
    """

    sigma: Tensor
    residual: Tensor


@overload
def sigmas(model: nn.Module, *, residual: Literal[False] = ...) -> dict[str, Tensor]: ...


@overload
def sigmas(model: nn.Module, *, residual: Literal[True]) -> dict[str, Sigma]: ...


@torch.no_grad()
def sigmas(model: nn.Module, *, residual: bool = False) -> dict[str, Tensor] | dict[str, Sigma]:
    """The sigma that each weight is divided by in eval mode, by FQN.

    From the stored u and v, which are not moved. Nothing waits for the device.

    Args:
        model: A transformed model, also inside ``torch.compile`` or DDP, or a parent of several. All ranks
            must call it if its weights are sharded.
        residual: Add the error bar, for one product with the weight more.

    Returns:
        ``{fqn: sigma []}``, fp32 or the weight's real dtype, on the weight's device; with ``residual``
        ``{fqn: Sigma}``. The FQN is that in the transformed model; where ``model`` holds several, that in it.

    Raises:
        TypeError: ``model`` holds no transformed model.
    """
    sites = sites_of(model)
    if residual:
        return {
            fqn: Sigma(*reference.residual(site.matrix(), *site.vectors(), site.config.eps))
            for fqn, site in sites.items()
        }
    found = {}
    for fqn, site in sites.items():
        u, v = (reference.unit(x, site.config.eps) for x in site.vectors())
        found[fqn] = reference.sigma(site.matrix(), u, v).abs()
    return found


class SigmaLogger:
    """Sigma and residual of every weight over the training, for TensorBoard.

    Called after the optimizer's step, it waits for nothing: on CUDA the values are copied to the host in the
    background, and written by a later call, when they have arrived. It computes them weight by weight, which
    takes as long as a step of a model with many small layers: there every tenth step is enough.

        log = SigmaLogger(SummaryWriter("runs/1"), critic)
        for step in range(steps):
            ...
            log(step)
        log.flush()

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar(tag, value,
            step)``. None on ranks that write nothing: all ranks must call a sharded model's logger.
        model: As in `sigmas`.

    Raises:
        TypeError: ``model`` holds no transformed model.
    """

    def __init__(self, writer: Any, model: nn.Module) -> None:
        self._writer = writer
        self._model = model
        self._pending: deque[tuple[int, list[str], Tensor, Any]] = deque()
        sites_of(model)  # which refuses a model that is not transformed

    def __call__(self, step: int) -> None:
        """Log the present sigmas.

        Args:
            step: The number of the step.
        """
        found = sigmas(self._model, residual=True)
        tags = [f"{name}/{fqn}" for fqn in found for name in ("sigma", "residual")]
        if self._writer is None or not tags:
            return
        device = next(iter(found.values())).sigma.device
        values = torch.stack(
            [x.to(device, torch.float64, non_blocking=True) for s in found.values() for x in s]
        )
        arrived = None
        if device.type == "cuda":
            pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            pinned.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            values = pinned
        self._pending.append((step, tags, values, arrived))
        while self._pending and (self._pending[0][3] is None or self._pending[0][3].query()):
            self._write()

    def flush(self) -> None:
        """Write what is on its way; waits for it."""
        while self._pending:
            arrived = self._pending[0][3]
            if arrived is not None:
                arrived.synchronize()
            self._write()

    def _write(self) -> None:
        step, tags, values, _ = self._pending.popleft()
        for tag, value in zip(tags, values.tolist(), strict=True):
            self._writer.add_scalar(tag, value, step)


@dataclass(frozen=True)
class Row:
    """One normalised weight.

    Attributes:
        fqn: Its name.
        shape: Its shape.
        sigma: By the stored u and v.
        exact: Its largest singular value, by SVD; NaN where the weight has NaN or inf.
        residual: See `specnorm_fx.reference.residual`: 0 for exact singular vectors.
    """

    fqn: str
    shape: tuple[int, ...]
    sigma: float
    exact: float
    residual: float


@dataclass(frozen=True)
class Report:
    """What `report` found; ``print`` shows it as a table.

    Attributes:
        rows: The normalised weights, in the order of the graph.
        skipped: FQN and reason of every other weight of a supported layer.
    """

    rows: tuple[Row, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        header = ("weight", "shape", "sigma", "exact", "residual")
        cells = [
            (
                row.fqn,
                "x".join(map(str, row.shape)),
                f"{row.sigma:.6g}",
                f"{row.exact:.6g}",
                f"{row.residual:.1e}",
            )
            for row in self.rows
        ]
        lines = [table([header, *cells], left=2)]
        lines += [f"{fqn}: skipped, {why}" for fqn, why in self.skipped.items()]
        return "\n".join(lines)


def skipped_weights(model: nn.Module) -> Iterator[tuple[str, capture.Weight, str]]:
    """The weights of supported layers that are not normalised.

    Args:
        model: As in `sigmas`.

    Yields:
        The FQN, as in `sigmas`, the weight, and why it is not.
    """
    for prefix, gm in transformed(model).items():
        normalized = {site.fqn for site in gm.sites()}
        # A frozen model does not know any more which of its weights are W / sigma.
        left_out = "not selected" if gm.call() else "the model is frozen"
        for weight in capture.find_weights(gm, gm.graph):
            if weight.fqn not in normalized:
                why = left_out if weight.nodes else capture.obstacle(weight, gm, gm.graph)
                yield prefix + weight.fqn, weight, why


def table(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells as text in columns.

    Args:
        lines: The header first, all of one length.
        left: How many columns are flush left; the others are numbers.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@torch.no_grad()
def report(model: nn.Module) -> Report:
    """Every weight: sigma, the exact value, how far u and v have converged; what is skipped and why.

    Computes all singular values of each weight, so it is for a look and not for every step.

    Args:
        model: As in `sigmas`. A sharded weight is gathered, one after the other.

    Returns:
        The rows and the skipped weights.

    Raises:
        TypeError: ``model`` holds no transformed model.
    """
    rows, sites = [], sites_of(model)
    for fqn, site in sites.items():
        sigma, residual = reference.residual(site.matrix(), *site.vectors(), site.config.eps)
        whole = reference.weight_matrix(sharded.full(site.weight.detach()), site.dim)
        if whole.isfinite().all():
            exact = reference.singular_values(whole)[0]
        else:  # it has none
            exact = torch.full_like(sigma, torch.nan)
        values = (value.item() for value in (sigma, exact, residual))
        rows.append(Row(fqn, tuple(site.weight.shape), *values))
    skipped = {fqn: why for fqn, _, why in skipped_weights(model)}
    for prefix, gm in transformed(model).items():
        computed = {prefix + fqn: why for fqn, why in capture.computed_weights(gm).items()}
        skipped |= {fqn: why for fqn, why in computed.items() if fqn not in sites}
    return Report(tuple(rows), skipped)
