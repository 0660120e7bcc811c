"""Gradient penalties, in eager mode and inside one compiled step: zero-centred (R1, R2) and WGAN-GP.

PyTorch refuses a second backward through a compiled model. It compiles a step in which the gradient with
respect to the input is part of the forward, so that ``loss.backward()`` is the one backward there is; but
Dynamo does not take ``torch.autograd.grad`` into its graph. The operators here it takes, as one call each,
and AOTAutograd behind it looks into them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from specnorm_fx import ops, reference

__all__ = ["r1", "r2", "wgan_gp"]

Model: TypeAlias = Callable[..., Any]
Inputs: TypeAlias = Tensor | Sequence[Tensor]
Score: TypeAlias = Callable[[Any], Tensor] | None


@overload
def r1(
    model: Model, real: Inputs, *args: Any, score: Score = ..., return_output: Literal[False] = ...
) -> Tensor: ...
@overload
def r1(
    model: Model, real: Inputs, *args: Any, score: Score = ..., return_output: Literal[True]
) -> tuple[Tensor, Any]: ...
def r1(
    model: Model, real: Inputs, *args: Any, score: Score = None, return_output: bool = False
) -> Tensor | tuple[Tensor, Any]:
    """``E |grad_x D(x)|^2`` at real samples (Mescheder et al., arXiv:1801.04406).

    The weight is the caller's: the paper's term is ``gamma / 2 * r1(model, real)``.

    One forward of the model, so that in training mode u and v iterate once (``update="forward"``) and
    batch norm counts once. Gradient flows to what the model closes over, its parameters, and not to
    ``real``.

    Args:
        model: The discriminator, or any callable. A sample's scores must depend on that sample alone:
            batch norm in training mode couples them, and the penalty is then that of the batch.
        real: ``[b, ...]`` of a floating dtype. Or several such: the model is called with all of them,
            and the norm is taken over all of them together.
        *args: What the model takes beside, labels say.
        score: Makes scores of what the model returns; needed where that is not one tensor. Scores of any
            shape are summed, over the patches of a sample too.
        return_output: Give what the model returned as well, so that D(real) need not run again.

    Returns:
        The penalty, ``[]``, in fp32 for half precision and else in the dtype of ``real``; with
        ``return_output`` the penalty and the output.

    Raises:
        TypeError: ``real`` is not floating, or the scores are not a tensor.
        ValueError: Several inputs are not of one batch size.
        RuntimeError: Gradients are disabled (``torch.no_grad``).
    """
    penalty, output = _zero_centred(model, real, args, score)
    return (penalty, output) if return_output else penalty


@overload
def r2(
    model: Model, fake: Inputs, *args: Any, score: Score = ..., return_output: Literal[False] = ...
) -> Tensor: ...
@overload
def r2(
    model: Model, fake: Inputs, *args: Any, score: Score = ..., return_output: Literal[True]
) -> tuple[Tensor, Any]: ...
def r2(
    model: Model, fake: Inputs, *args: Any, score: Score = None, return_output: bool = False
) -> Tensor | tuple[Tensor, Any]:
    """``E |grad_x D(x)|^2`` at generated samples: `r1` but for the samples.

    Args:
        model: As in `r1`.
        fake: As ``real`` in `r1`; no gradient flows to the generator.
        *args: As in `r1`.
        score: As in `r1`.
        return_output: As in `r1`.

    Returns:
        As `r1`.

    Raises:
        TypeError: As in `r1`.
        ValueError: As in `r1`.
        RuntimeError: As in `r1`.
    """
    penalty, output = _zero_centred(model, fake, args, score)
    return (penalty, output) if return_output else penalty


def wgan_gp(
    model: Model, real: Inputs, fake: Inputs, *args: Any, alpha: Tensor | None = None, score: Score = None
) -> Tensor:
    """``E (|grad_x D(x)| - 1)^2`` between real and generated samples (Gulrajani et al., arXiv:1704.00028).

    ``x = alpha real + (1 - alpha) fake``, with one alpha for each sample. The weight is the caller's: the
    paper's term is ``10 * wgan_gp(model, real, fake)``. Where the gradient is zero its norm has no
    derivative, and 0 is taken, as PyTorch does: the penalty there is 1, and pulls nowhere.

    One forward of the model, as in `r1`.

    Args:
        model: As in `r1`.
        real: As in `r1`.
        fake: Of the same shapes; no gradient flows to the generator.
        *args: As in `r1`.
        alpha: ``[b]``, from 0 to 1; drawn uniformly from the global generator if not given.
        score: As in `r1`.

    Returns:
        The penalty, as in `r1`.

    Raises:
        ValueError: ``real`` and ``fake`` differ in shape, or ``alpha`` is not ``[b]``; and as in `r1`.
        TypeError: As in `r1`.
        RuntimeError: As in `r1`.
    """
    reals, fakes = _listed(real), _listed(fake)
    shapes, others = [tuple(x.shape) for x in reals], [tuple(x.shape) for x in fakes]
    if shapes != others:
        raise ValueError(
            f"fake must have the shape of real, {shapes}, got {others}. Give as many of each, cut to size."
        )
    batch = reals[0].shape[0]
    if alpha is None:
        alpha = torch.rand(batch, device=reals[0].device)
    if not isinstance(alpha, Tensor) or alpha.shape != (batch,):
        got = tuple(alpha.shape) if isinstance(alpha, Tensor) else repr(alpha)
        raise ValueError(f"alpha must have a number for each sample, shape ({batch},), got {got}.")
    between = [_between(*pair, alpha) for pair in zip(reals, fakes, strict=True)]
    slopes, _ = _slopes(model, between, args, score)
    norms: Tensor = torch.linalg.vector_norm(slopes, dim=1)
    return (norms - 1).square().mean()


def _between(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.to(torch.promote_types(real.dtype, fake.dtype))
    alpha = alpha.reshape(-1, *[1] * (real.ndim - 1))
    return alpha * real + (1 - alpha) * fake


def _zero_centred(model: Model, inputs: Inputs, args: tuple[Any, ...], score: Score) -> tuple[Tensor, Any]:
    slopes, output = _slopes(model, _listed(inputs), args, score)
    return slopes.square().sum(1).mean(), output


def _slopes(model: Model, inputs: list[Tensor], args: tuple[Any, ...], score: Score) -> tuple[Tensor, Any]:
    """The gradient of the summed scores with respect to the inputs, ``[b, elements]``; and the output."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "A gradient penalty must be computed with gradients enabled, got torch.no_grad. Call it under "
            "torch.enable_grad()."
        )
    leaves = [_leaf(x) for x in inputs]
    output = model(*leaves, *args)
    scores = output if score is None else score(output)
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"The scores must be a tensor, got {type(scores).__name__}. Say what of it to penalise: "
            f"score=lambda output: output[0], or a sum."
        )
    slopes = _gradients(scores.sum(), leaves)
    # A sample may be a single number, [b].
    rows = [slope.to(reference.compute_dtype(slope)).unsqueeze(-1).flatten(1) for slope in slopes]
    return torch.cat(rows, dim=1), output


def _listed(inputs: Inputs) -> list[Tensor]:
    samples = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for x in samples:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"The samples must be floating tensors, got {kind}. Pass labels behind them.")
    # One batch would be broadcast to another without a word.
    if not samples or any(x.ndim == 0 or x.shape[:1] != samples[0].shape[:1] for x in samples):
        shapes = [tuple(x.shape) for x in samples]
        raise ValueError(f"The samples must be of one batch size, [b, ...], got {shapes}.")
    return samples


# --- The operators ---


def _define(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """Composite: AOTAutograd goes through what it is made of, for Dynamo it is one call."""
    qualified = f"specnorm_fx::{name}.{ops.REVISION}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeImplicitAutograd", function)
    return getattr(getattr(torch.ops.specnorm_fx, name), ops.REVISION)


# The input as a leaf, to be differentiated by. Dynamo does not let anything out of the graph that comes from
# a leaf made in Python code.
_leaf = _define("leaf", "(Tensor(a) input) -> Tensor(a)", lambda x: x.detach().requires_grad_())
# The gradient of `output`, [], with respect to each of the inputs, differentiable again.
_gradients = _define(
    "gradients",
    "(Tensor output, Tensor[] inputs) -> Tensor[]",
    lambda output, inputs: list(torch.autograd.grad(output, inputs, create_graph=True)),
)
