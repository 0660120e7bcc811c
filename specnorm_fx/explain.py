"""What `specnorm_fx.backend.specnorm` would fuse in a model, and what not, and why."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from specnorm_fx.adopt import find_torch_sn
from specnorm_fx.fuse import Fused, Passed, fqn_in_source, fuse_

__all__ = ["Explanation", "GraphExplanation", "explain"]


@dataclass(frozen=True)
class GraphExplanation:
    """One graph that Dynamo captured.

    Attributes:
        fused: Each use of torch's spectral norm that becomes part of an operator call.
        passed: What looks like one, and stays as it is.
    """

    fused: tuple[Fused, ...]
    passed: tuple[Passed, ...]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; ``str`` makes a table of it.

    Attributes:
        graphs: In order of capture.
        missing: Weights with torch's spectral norm that no graph computes.
        breaks: Why Dynamo ended a graph before the end of the forward.
    """

    graphs: tuple[GraphExplanation, ...]
    missing: tuple[Passed, ...]
    breaks: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for number, graph in enumerate(self.graphs, 1):
            lines.append(f"graph {number}: {len(graph.fused)} fused, {len(graph.passed)} passed through")
            lines += [f"  fused   {use.fqn}  {_options(use)}" for use in graph.fused]
            lines += [f"  passed  {entry.fqn}  {entry.reason}" for entry in graph.passed]
        lines += [f"in no graph: {entry.fqn}  {entry.reason}" for entry in self.missing]
        lines += [f"graph break: {reason}" for reason in self.breaks]
        return "\n".join(lines) or "no graph was captured"


def _options(use: Fused) -> str:
    shape = " x ".join(map(str, use.shape))
    iterations = f"n_power_iterations {use.n_power_iterations}" if use.n_power_iterations else "eval"
    only = "" if use.divides else ", power iteration only"
    return f"{shape}, dim {use.dim}, {iterations}{only}"


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Capture a call of a model as ``torch.compile(model, backend="specnorm")`` would, and say what is fused.

    The model runs once, in the mode it is in, as captured but not compiled. Buffers (u, v, batch statistics)
    and torch's random number generators are put back afterwards. Compiled code of the process is dropped, as
    ``torch._dynamo.explain`` does.

    Args:
        model: Any model; one that is compiled already is taken for what it was.
        *args: Of the call.
        **kwargs: Of the call.

    Returns:
        By graph: what is fused, what passes through and why.

    Raises:
        Exception: What the model raises.
    """
    model = getattr(model, "_orig_mod", model)
    weights = find_torch_sn(model)
    fqns: dict[int, list[str]] = {}  # more than one for a tied weight
    for fqn, sn in weights.items():
        for tensor in sn.stored:
            fqns.setdefault(id(tensor), []).append(fqn)
    graphs: list[GraphExplanation] = []

    def name_of(node: fx.Node) -> str:
        # By identity: where Dynamo captures the forward of a part, the source is relative to that part.
        example = getattr(node.meta.get("grapharg"), "example", None)
        known, in_source = fqns.get(id(example), []), fqn_in_source(node)
        return in_source if in_source in known or not known else known[0]

    def record(gm: fx.GraphModule, example_inputs: Any) -> Any:
        fused, passed = fuse_(gm, name_of=name_of)
        graphs.append(GraphExplanation(tuple(fused), tuple(passed)))
        return gm.forward

    counted: Counter[str] = torch._dynamo.utils.counters["graph_break"]
    before = counted.copy()
    modules = list(model.modules())
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    registered = [dict(module._buffers) for module in modules]
    # The old hook's weight, W / sigma, is a plain attribute that every forward sets.
    set_by_hooks = [{k: x for k, x in vars(module).items() if isinstance(x, Tensor)} for module in modules]
    compiled = [module._compiled_call_impl for module in modules]
    torch._dynamo.reset()
    try:
        for module in modules:
            module._compiled_call_impl = None
        with torch.random.fork_rng():
            torch.compile(model, backend=record)(*args, **kwargs)
    finally:
        for module, held, plain, call in zip(modules, registered, set_by_hooks, compiled, strict=True):
            module._buffers, module._compiled_call_impl = held, call
            vars(module).update(plain)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch._dynamo.reset()

    fused_fqns = {use.fqn for graph in graphs for use in graph.fused}
    seen = fused_fqns | {entry.fqn for graph in graphs for entry in graph.passed}
    seen |= {name for names in fqns.values() if seen & set(names) for name in names}
    missing = [fqn for fqn in weights if fqn not in seen]
    reason = "not used by this call, or in code that Dynamo leaves to Python"
    if any(isinstance(module, nn.RNNBase) for module in modules) and not torch._dynamo.config.allow_rnn:
        reason += " (as any forward that calls an nn.RNN, LSTM or GRU: torch._dynamo.config.allow_rnn)"
    # Dynamo's reasons go on with hints and links.
    breaks = dict.fromkeys(text.strip().partition("\n")[0] for text in counted - before)
    return Explanation(tuple(graphs), tuple(Passed(fqn, reason) for fqn in missing), tuple(breaks))
