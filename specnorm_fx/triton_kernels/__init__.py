"""Spectral norm of up to 64 weights in a handful of CUDA launches, whatever their number.

The mathematics and its guards are those of `specnorm_fx.reference`. Here a weight is a matrix ``W`` of
shape ``[p, q]`` and one power iteration is ``t = W y, x = t / |t|, s = W^T x, y = s / |s|``. In the
order ``"uv"`` x is u, y is v and p counts the rows; in the order ``"vu"`` x is v, y is u and p counts
the columns: one kernel serves both, with the strides exchanged.

`launching` has the calls. What they need that depends on shapes alone is in a table on the device:
`layout` says how a weight lies in memory, `tiles` how it is cut, `fields` what a row of the table holds,
and `tables` makes it. The kernels are in `iteration` and `gradient`, of common `parts`.

Partial sums are added in a fixed order that depends on the weight's own shape alone: two runs, and
a weight alone or among others, give the same bits.
"""

from specnorm_fx.triton_kernels.launching import normalize as normalize
from specnorm_fx.triton_kernels.launching import normalize_backward as normalize_backward
from specnorm_fx.triton_kernels.launching import power_iteration as power_iteration
from specnorm_fx.triton_kernels.launching import start as start

__all__ = ["normalize", "normalize_backward", "power_iteration", "start"]
