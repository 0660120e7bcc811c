"""A look at sigma: `sigmas` for logging in training, `report` for everything about every weight."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from specnorm_fx import capture, reference, sharded
from specnorm_fx.graph_module import sites_of, transformed

__all__ = ["Report", "Row", "Sigma", "report", "sigmas"]


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
        ``{fqn: Sigma}``.

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


@dataclass(frozen=True)
class Row:
    """One normalised weight.

    Attributes:
        fqn: Its name.
        shape: Its shape.
        sigma: By the stored u and v.
        exact: Its largest singular value, by SVD.
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
        table = [header] + [
            (
                row.fqn,
                "x".join(map(str, row.shape)),
                f"{row.sigma:.6g}",
                f"{row.exact:.6g}",
                f"{row.residual:.1e}",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        lines += [f"{fqn}: skipped, {why}" for fqn, why in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module) -> Report:
    """Every weight: sigma, the exact value, how far u and v have converged; what is skipped and why.

    Computes an SVD of each weight, so it is for a look and not for every step.

    Args:
        model: As in `sigmas`. A sharded weight is gathered, one after the other.

    Returns:
        The rows and the skipped weights.

    Raises:
        TypeError: ``model`` holds no transformed model.
    """
    rows = []
    for fqn, site in sites_of(model).items():
        sigma, residual = reference.residual(site.matrix(), *site.vectors(), site.config.eps)
        whole = sharded.full(site.weight.detach())
        exact = torch.linalg.matrix_norm(reference.weight_matrix(whole, site.config.dim or 0), ord=2)
        values = (value.item() for value in (sigma, exact, residual))
        rows.append(Row(fqn, tuple(site.weight.shape), *values))
    found = transformed(model)
    skipped: dict[str, str] = {}
    for name, gm in found.items():
        normalized = {site.fqn for site in gm.sites()}
        prefix = f"{name}." if len(found) > 1 else ""
        skipped |= {
            prefix + weight.fqn: "not selected" if weight.nodes else capture.obstacle(weight, gm, gm.graph)
            for weight in capture.find_weights(gm, gm.graph)
            if weight.fqn not in normalized
        }
    return Report(tuple(rows), skipped)
