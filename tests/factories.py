"""Models by name, and trained, for the tests of loading and of the command."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations

FILE = Path(__file__)
SHAPE = (2, 3, 16, 16)
NORMALIZED = ("blocks.0.weight", "up.weight", "fc.weight")  # not blocks.2


class Discriminator(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.up = nn.ConvTranspose2d(channels, 4, 2, stride=2)
        self.fc = nn.Linear(4 * 8 * 8, 1)

    def forward(self, image):
        return self.fc(self.up(self.blocks(image)).flatten(1))


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.embed = nn.Embedding(10, 4)

    def forward(self, image, label):
        h = self.conv(image).mean((2, 3))
        return h.sum(1), (self.embed(label) * h).sum(1)


def with_torch_sn():
    model = Discriminator()
    parametrizations.spectral_norm(model.fc, n_power_iterations=2)
    return model


def prints():
    print("building")
    return Discriminator()


def no_model():
    return 3


def fails():
    raise OSError("no space for a model")


class Branch(Discriminator):
    """Symbolic trace cannot follow it."""

    def forward(self, image):
        return super().forward(image) if image.sum() > 0 else image


class Mode(Discriminator):
    """Its last operator is not in ONNX."""

    def forward(self, image):
        return super().forward(image).mode(0).values


class WithBessel(Discriminator):
    """The same scores, by way of an operator that is not in ONNX."""

    def forward(self, image):
        scores = super().forward(image)
        return scores + 0 * torch.special.bessel_j0(scores)


class Factories:
    small = staticmethod(lambda: Discriminator(4))


def leaves():
    sys.exit("bye")


def train(model, shape=SHAPE):
    """Two steps, so that weights, u and v are none that a start would give."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    return model.eval()


def normalized_by(sn, model):
    for fqn in NORMALIZED:
        sn(model.get_submodule(fqn.removesuffix(".weight")))
    return train(model)
