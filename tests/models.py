"""The zoo: small models, each with the weights that `transform` normalises in it by default."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Functional(nn.Module):
    """Uses a layer's weight by function, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.projection = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        x = F.linear(x, self.lin.weight, self.lin.bias)
        return F.linear(F.relu(x), self.projection)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(F.relu(self.lin(x)))


class Tied(nn.Module):
    """One weight under two names, in layers of two kinds."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(F.relu(self.encoder(x)))


class Block(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h + self.skip(x), 2)


class Discriminator(nn.Module):
    """Nested modules, batch norm and dropout, a buffer, and a layer that the forward does not use."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 8), Block(8, 8))
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 1)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("offset", torch.tensor([1.0]), persistent=False)

    def forward(self, x):
        h = self.dropout(self.norm(self.blocks(x)))
        return self.fc(h.mean((2, 3))) * (self.scale + self.offset)


class MyConv(nn.Conv2d):
    """A user's layer: fx looks into it, as it is not in torch.nn."""

    def forward(self, x):
        return super().forward(x) + 1


class Labelled(nn.Module):
    """A projection discriminator: an embedding beside the image path."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.embed = nn.Embedding(10, 6)
        self.fc = nn.Linear(6, 1)

    def forward(self, x, label):
        h = F.leaky_relu(self.conv(x), 0.2).mean((2, 3))
        return self.fc(h) + (self.embed(label) * h).sum(1, keepdim=True)


class DomainMix(nn.Module):
    """Two convolutions of which one is frozen."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Conv1d(2, 4, 3).requires_grad_(False)
        self.free = nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.free(F.relu(self.fixed(x)))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    weights: tuple[str, ...] = ("weight",)

    def build(self, dtype=torch.float32):
        model = self.make()
        for parameter in model.parameters():  # .to(dtype) warns about complex modules
            parameter.data = torch.randn_like(parameter, dtype=dtype)
        return model

    def inputs(self, batch=2, dtype=torch.float32):
        x = torch.randn(batch, *self.shape, dtype=dtype)
        return (x, torch.randint(10, (batch,))) if self.make is Labelled else (x,)


# Single layers, of every kind and option.
LAYERS = [
    Case("linear", partial(nn.Linear, 7, 5), (7,)),
    Case("linear_no_bias", partial(nn.Linear, 5, 7, bias=False), (5,)),
    Case("linear_one_row", partial(nn.Linear, 7, 1), (7,)),
    Case("linear_one_column", partial(nn.Linear, 1, 4), (1,)),
    Case("linear_3d_input", partial(nn.Linear, 7, 5), (3, 7)),
    Case("conv1d", partial(nn.Conv1d, 4, 6, 3, groups=2, dilation=2), (4, 16)),
    Case("conv1d_same", partial(nn.Conv1d, 4, 6, 3, padding="same"), (4, 16)),
    Case("conv2d", partial(nn.Conv2d, 3, 8, 3, stride=2, padding=1), (3, 8, 8)),
    Case("conv2d_depthwise", partial(nn.Conv2d, 4, 4, 3, groups=4), (4, 6, 6)),
    Case("conv2d_reflect", partial(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    Case("conv2d_replicate", partial(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="replicate"), (3, 6, 6)),
    Case("conv2d_circular", partial(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    Case("conv2d_one_row", partial(nn.Conv2d, 4, 1, 3, bias=False), (4, 6, 6)),
    Case("conv3d", partial(nn.Conv3d, 2, 4, 3, bias=False), (2, 5, 5, 5)),
    Case("conv_transpose1d", partial(nn.ConvTranspose1d, 4, 6, 3, groups=2, dilation=2), (4, 8)),
    Case("conv_transpose2d", partial(nn.ConvTranspose2d, 3, 5, 4, stride=2, padding=1), (3, 6, 6)),
    Case("conv_transpose3d", partial(nn.ConvTranspose3d, 2, 3, 3, output_padding=1, stride=2), (2, 4, 4, 4)),
]

# Whole models.
MODELS = [
    Case("functional", Functional, (6,), ("projection", "lin.weight")),
    Case("called_twice", CalledTwice, (6,), ("lin.weight",)),
    Case("tied", Tied, (6,), ("encoder.weight",)),
    Case(
        "discriminator",
        Discriminator,
        (3, 8, 8),
        (
            *(f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("conv1", "conv2", "skip")),
            "fc.weight",
        ),
    ),
    Case("subclass", lambda: nn.Sequential(MyConv(3, 4, 3), nn.ReLU()), (3, 6, 6), ("0.weight",)),
    Case("labelled", Labelled, (1, 6, 6), ("conv.weight", "fc.weight")),
    Case("frozen_parameter", DomainMix, (2, 12), ("fixed.weight", "free.weight")),
]


def case_named(name):
    (case,) = (case for case in LAYERS + MODELS if case.name == name)
    return case


def parametrize(cases, argument="case"):
    return pytest.mark.parametrize(argument, cases, ids=[case.name for case in cases])


def parameters_equal(a: nn.Module, b: nn.Module):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def apply_torch_sn(model: nn.Module, weights: tuple[str, ...], sn, **options):
    """Put torch's spectral norm (either API) on weights, by FQN, in order."""
    for fqn in weights:
        module, _, name = fqn.rpartition(".")
        sn(model.get_submodule(module), name, **options)
    return model


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((got.detach().to(truth.dtype) - truth.detach()).abs().max() / truth.abs().max()).item()
