"""Discriminators that people train, narrow versions written after their published descriptions."""

import torch
import torch.nn.functional as F
from torch import nn


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
    """SAGAN (arXiv:1805.08318), as in BigGAN."""

    def __init__(self, c):
        super().__init__()
        self.query, self.key = (nn.Conv2d(c, c // 8, 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(c, c // 2, 1, bias=False)
        self.out = nn.Conv2d(c // 2, c, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

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


class PeriodDiscriminator(nn.Module):
    """HiFi-GAN's: sound in columns of one period, padded to a multiple of it; a label is optional."""

    def __init__(self, period, c=4):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(1, c, (5, 1), (3, 1), padding=(2, 0)),
                nn.Conv2d(c, 2 * c, (5, 1), (3, 1), padding=(2, 0)),
            ]
        )
        self.post = nn.Conv2d(2 * c, 1, (3, 1), padding=(1, 0))

    def forward(self, x, label=None):
        b, c, t = x.shape
        if t % self.period != 0:
            x = F.pad(x, (0, self.period - t % self.period), "reflect")
            t = t + self.period - t % self.period
        x = x.view(b, c, t // self.period, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.post(x)
        score = torch.flatten(x, 1, -1)
        return score if label is None else score * label, [*features, x]


class MultiPeriodDiscriminator(nn.Module):
    """HiFi-GAN's: one for each period, on real and generated sound."""

    def __init__(self, periods=(2, 3)):
        super().__init__()
        self.discriminators = nn.ModuleList([PeriodDiscriminator(period) for period in periods])

    def forward(self, real, fake):
        pairs = [(d(real), d(fake)) for d in self.discriminators]
        return {"scores": [(r[0], f[0]) for r, f in pairs], "features": [(r[1], f[1]) for r, f in pairs]}


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
