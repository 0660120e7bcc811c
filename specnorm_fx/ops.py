"""The operator ``specnorm_fx::singular_vectors``: u and v of all weights in one opaque call.

An operator, because ``torch.compile`` must not look inside: were the power iteration a part of the graph,
Inductor would write the new u straight into its buffer and save that buffer for backward, where the next
forward overwrites it (torch 2.13: "modified by an inplace operation" for D(real) - D(fake)). And one call
costs the same to compile for any number of iterations.
"""

import torch
from torch import Tensor

from specnorm_fx import reference

__all__ = ["singular_vectors"]

torch.library.define(
    "specnorm_fx::singular_vectors",
    "(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] n_power_iterations, float[] eps, int[] dims, "
    "str[] orders) -> (Tensor[], Tensor[])",
)


def _singular_vectors(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: list[int],
    eps: list[float],
    dims: list[int],
    orders: list[str],
) -> tuple[list[Tensor], list[Tensor]]:
    columns = (weights, us, vs, n_power_iterations, eps, dims, orders)
    pairs = [reference.singular_vectors(*site) for site in zip(*columns, strict=True)]
    return [u for u, _ in pairs], [v for _, v in pairs]


def _fake_singular_vectors(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: object
) -> tuple[list[Tensor], list[Tensor]]:
    dtypes = [reference.compute_dtype(weight) for weight in weights]
    return tuple(  # type: ignore[return-value]
        [torch.empty_like(x, dtype=dtype) for x, dtype in zip(column, dtypes, strict=True)]
        for column in (us, vs)
    )


torch.library.impl("specnorm_fx::singular_vectors", "CompositeExplicitAutograd", _singular_vectors)
torch.library.register_fake("specnorm_fx::singular_vectors", _fake_singular_vectors)

# (weights, us, vs, n_power_iterations, eps, dims, orders) -> (us, vs): `reference.singular_vectors` of each
# weight, which must be detached. The results are fresh tensors and carry no gradient.
singular_vectors = torch.ops.specnorm_fx.singular_vectors.default
