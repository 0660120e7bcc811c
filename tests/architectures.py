"""Models that people train with spectral norm, narrow versions written after their published descriptions."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)


class ResBlock(nn.Module):
    """SNGAN (arXiv:1802.05957), BigGAN (arXiv:1809.11096)."""

    def __init__(self, c_in, c_out, down=True):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else None
        self.down = down

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        skip = x if self.skip is None else self.skip(x)
        return F.avg_pool2d(h + skip, 2) if self.down else h + skip


class SelfAttention(nn.Module):
    """SAGAN (arXiv:1805.08318): 1x1 convolutions, pooled keys and values, a gain that starts at zero."""

    def __init__(self, c=16):
        super().__init__()
        self.query, self.key = (nn.Conv2d(c, c // 8, 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(c, c // 2, 1, bias=False)
        self.out = nn.Conv2d(c // 2, c, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, _, h, w = x.shape
        query = self.query(x).view(b, -1, h * w)
        key = F.max_pool2d(self.key(x), 2).view(b, -1, h * w // 4)
        value = F.max_pool2d(self.value(x), 2).view(b, -1, h * w // 4)
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        return self.gain * self.out((value @ attention.transpose(1, 2)).view(b, -1, h, w)) + x


class ProjectionDiscriminator(nn.Module):
    """BigGAN's: residual blocks, attention, and the label by an inner product with its embedding."""

    def __init__(self, c=16):
        super().__init__()
        self.blocks = nn.ModuleList(
            [ResBlock(3, c), SelfAttention(c), ResBlock(c, 2 * c), ResBlock(2 * c, 2 * c, down=False)]
        )
        self.linear = nn.Linear(2 * c, 1)
        self.embed = nn.Embedding(10, 2 * c)

    def forward(self, x, label):
        for block in self.blocks:
            x = block(x)
        h = F.relu(x).sum((2, 3))
        return self.linear(h) + (self.embed(label) * h).sum(1, keepdim=True)


class PatchGAN(nn.Module):
    """pix2pix (arXiv:1611.07004), with batch norm and in-place activations."""

    def __init__(self, c=16):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, c, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * c),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * c, 1, 4, 1, 1),
        )

    def forward(self, x):
        return self.model(x)


class ScaleDiscriminator(nn.Module):
    """HiFi-GAN's (arXiv:2010.05646): grouped convolutions on sound; gives its feature maps, too."""

    def __init__(self, c=16):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(1, c, 15, 1, padding=7),
                nn.Conv1d(c, c, 41, 2, padding=20, groups=4),
                nn.Conv1d(c, 2 * c, 41, 2, padding=20, groups=16),
            ]
        )
        self.post = nn.Conv1d(2 * c, 1, 3, padding=1)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.post(x)
        return torch.flatten(x, 1, -1), [*features, x]


class MultiScaleDiscriminator(nn.Module):
    """HiFi-GAN's (arXiv:2010.05646), of its three resolutions of the sound the first two."""

    def __init__(self):
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator() for _ in range(2))
        self.pools = nn.ModuleList([nn.AvgPool1d(4, 2, padding=2)])

    def forward(self, x):
        scores, features = [], []
        for i, discriminator in enumerate(self.discriminators):
            if i != 0:
                x = self.pools[i - 1](x)
            score, maps = discriminator(x)
            scores.append(score)
            features.append(maps)
        return scores, features


class PeriodDiscriminator(nn.Module):
    """HiFi-GAN's (arXiv:2010.05646): sound folded to rows of one period; pads by what the length leaves."""

    def __init__(self, period, c=4):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(1, c, (5, 1), (3, 1), padding=(2, 0)),
                nn.Conv2d(c, 2 * c, (5, 1), (3, 1), padding=(2, 0)),
                nn.Conv2d(2 * c, 2 * c, (5, 1), 1, padding=(2, 0)),
            ]
        )
        self.post = nn.Conv2d(2 * c, 1, (3, 1), 1, padding=(1, 0))

    def forward(self, x):
        features = []
        b, c, t = x.shape
        if t % self.period != 0:
            pad = self.period - t % self.period
            x = F.pad(x, (0, pad), "reflect")
            t = t + pad
        x = x.view(b, c, t // self.period, self.period)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.post(x)
        return torch.flatten(x, 1, -1), [*features, x]


class MultiPeriodDiscriminator(nn.Module):
    """HiFi-GAN's (arXiv:2010.05646), of its periods 2, 3, 5, 7, 11 the first two."""

    def __init__(self):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period) for period in (2, 3))

    def forward(self, x):
        scores, features = [], []
        for discriminator in self.discriminators:
            score, maps = discriminator(x)
            scores.append(score)
            features.append(maps)
        return scores, features


class UNetDiscriminator(nn.Module):
    """Real-ESRGAN's (arXiv:2107.10833): skips and bilinear upsampling."""

    def __init__(self, c=8):
        super().__init__()
        self.conv0 = nn.Conv2d(3, c, 3, 1, 1)
        self.conv1 = nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False)
        self.up2 = nn.Conv2d(4 * c, 2 * c, 3, 1, 1, bias=False)
        self.up1 = nn.Conv2d(2 * c, c, 3, 1, 1, bias=False)
        self.out = nn.Conv2d(c, 1, 3, 1, 1)

    def forward(self, x):
        x0 = F.leaky_relu(self.conv0(x), 0.2, inplace=True)
        x1 = F.leaky_relu(self.conv1(x0), 0.2, inplace=True)
        x2 = F.leaky_relu(self.conv2(x1), 0.2, inplace=True)
        up = F.interpolate(x2, scale_factor=2, mode="bilinear", align_corners=False)
        up = F.leaky_relu(self.up2(up), 0.2, inplace=True) + x1
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(F.leaky_relu(self.up1(up), 0.2, inplace=True) + x0)


class SNTransformerBlock(nn.Module):
    """Pre-norm (arXiv:2002.04745), for spectral norm on every Linear as in arXiv:2303.06296."""

    def __init__(self, c=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.query, self.key, self.value, self.out = (nn.Linear(c, c) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x):
        h = self.norm1(x)
        heads = [
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class WideBlock(nn.Module):
    """Wide residual networks (arXiv:1605.07146), batch norm and activation first."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nn.Module):
    """SNGP's (arXiv:2006.10108) of depth 10, with a Linear layer for its Gaussian process."""

    def __init__(self, c=4, width=2):
        super().__init__()
        self.conv = nn.Conv2d(3, c, 3, padding=1, bias=False)
        widths = [c, width * c, 2 * width * c, 4 * width * c]
        self.blocks = nn.Sequential(
            *(WideBlock(widths[i], widths[i + 1], stride) for i, stride in enumerate((1, 2, 2)))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x):
        h = F.relu(self.norm(self.blocks(self.conv(x))))
        return self.linear(h.mean((2, 3)))


class MonitoredDiscriminator(nn.Module):
    """Projection (arXiv:1802.05637) as training scripts have it: an optional label, a value to the log."""

    def __init__(self, c=8):
        super().__init__()
        self.block = ResBlock(3, c)
        self.linear = nn.Linear(c, 1)
        self.embed = nn.Embedding(10, c)

    def forward(self, x, label=None):
        h = F.relu(self.block(x)).sum((2, 3))
        mean = h.mean().item()
        if mean > 100:
            logger.warning("features have grown to %.1f on average", mean)
        if label is None:
            return self.linear(h)
        return self.linear(h) + (self.embed(label) * h).sum(1, keepdim=True)


@dataclass(frozen=True)
class Architecture:
    """A model, the shape of one input, and the captures that work; Dynamo breaks the graph where it must."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    labelled: bool = False
    captures: tuple[str, ...] = ("trace", "export", "dynamo")

    def build(self):
        """With no parameter at zero: a gain of zero would hide all that it scales."""
        model = self.make()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter)
        return model

    def inputs(self, batch=2):
        x = torch.randn(batch, *self.shape)
        return (x, torch.randint(10, (batch,))) if self.labelled else (x,)


ARCHITECTURES = [
    Architecture("projection", ProjectionDiscriminator, (3, 16, 16), labelled=True),
    Architecture("patchgan", PatchGAN, (3, 32, 32)),
    Architecture("unet", UNetDiscriminator, (3, 16, 16)),
    Architecture("multi_scale", MultiScaleDiscriminator, (1, 256)),
    Architecture("multi_period", MultiPeriodDiscriminator, (1, 256), captures=("export", "dynamo")),
    Architecture("self_attention", SelfAttention, (16, 8, 8)),
    Architecture("transformer", SNTransformerBlock, (5, 16)),
    Architecture("wide_resnet", WideResNet, (3, 16, 16)),
    Architecture("monitored", MonitoredDiscriminator, (3, 16, 16), labelled=True, captures=("dynamo",)),
]
