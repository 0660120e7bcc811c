"""The models that are measured, at the sizes people train, after their published descriptions."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CASES", "Case"]


class ResBlock(nn.Module):
    """The residual block of SNGAN (arXiv:1802.05957) and BigGAN (arXiv:1809.11096).

    Args:
        c_in: Channels that come in.
        c_mid: Channels between the two 3 x 3 convolutions.
        c_out: Channels that go out.
        down: Whether it halves the resolution.
        first: It sees the image: no ReLU at its head, and the skip pools before its convolution.
    """

    def __init__(self, c_in: int, c_mid: int, c_out: int, down: bool = True, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else None
        self.down = down
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, h', w']."""
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.down:
            h = F.avg_pool2d(h, 2)
        if self.down and self.first:
            return h + self.skip(F.avg_pool2d(x, 2))
        skip = x if self.skip is None else self.skip(x)
        return h + (F.avg_pool2d(skip, 2) if self.down else skip)


class SNGAN(nn.Sequential):
    """The ResNet discriminators of SNGAN (arXiv:1802.05957, tables 4 and 5), without the projection.

    Args:
        widths: Channels behind each block.
        down: How many of the blocks halve the resolution.
    """

    def __init__(self, widths: tuple[int, ...], down: int) -> None:
        blocks = [ResBlock(3, widths[0], widths[0], first=True)]
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths), start=1):
            blocks.append(ResBlock(c_in, c_in, c_out, down=i < down))
        super().__init__(*blocks)
        self.linear = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] -> [b, 1]."""
        *blocks, linear = self
        for block in blocks:
            x = block(x)
        return linear(F.relu(x).sum((2, 3)))


class SelfAttention(nn.Module):
    """SAGAN's (arXiv:1805.08318), as BigGAN has it.

    Args:
        c: Channels.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv2d(c, c // 8, 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(c, c // 2, 1, bias=False)
        self.out = nn.Conv2d(c // 2, c, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c, h, w]."""
        b, _, h, w = x.shape
        query = self.query(x).view(b, -1, h * w)
        key = F.max_pool2d(self.key(x), 2).view(b, -1, h * w // 4)
        value = F.max_pool2d(self.value(x), 2).view(b, -1, h * w // 4)
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        return self.gain * self.out((value @ attention.transpose(1, 2)).view(b, -1, h, w)) + x


class BigGAN(nn.Module):
    """BigGAN-128's (arXiv:1809.11096): attention at 64 x 64, the label by its embedding's inner product.

    Args:
        c: Channels behind the first block.
        classes: Number of labels.
    """

    def __init__(self, c: int = 96, classes: int = 1000) -> None:
        super().__init__()
        widths = [c, 2 * c, 4 * c, 8 * c, 16 * c]
        deeper = [ResBlock(c_in, c_out, c_out) for c_in, c_out in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(
            ResBlock(3, c, c, first=True),
            SelfAttention(c),
            *deeper,
            ResBlock(16 * c, 16 * c, 16 * c, down=False),
        )
        self.linear = nn.Linear(16 * c, 1)
        self.embed = nn.Embedding(classes, 16 * c)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """[b, 3, 128, 128], [b] -> [b, 1]."""
        h = F.relu(self.blocks(x)).sum((2, 3))
        return self.linear(h) + (self.embed(label) * h).sum(1, keepdim=True)


class ScaleDiscriminator(nn.Module):
    """One of the three in HiFi-GAN's multi-scale discriminator (arXiv:2010.05646)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv1d(1, 128, 15, padding=7),
            nn.Conv1d(128, 128, 41, 2, groups=4, padding=20),
            nn.Conv1d(128, 256, 41, 2, groups=16, padding=20),
            nn.Conv1d(256, 512, 41, 4, groups=16, padding=20),
            nn.Conv1d(512, 1024, 41, 4, groups=16, padding=20),
            nn.Conv1d(1024, 1024, 41, groups=16, padding=20),
            nn.Conv1d(1024, 1024, 5, padding=2),
        )
        self.post = nn.Conv1d(1024, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, samples] -> [b, scores]."""
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.post(x).flatten(1)


class MSD(nn.Module):
    """HiFi-GAN's multi-scale discriminator (arXiv:2010.05646): the sound, and its halves in resolution.

    Published with spectral norm on the first scale and weight norm on the others; here all three carry
    spectral norm. The feature maps, which only the generator's loss uses, are not returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(ScaleDiscriminator() for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[b, 1, samples] -> scores of each scale."""
        scores = []
        for i, scale in enumerate(self.scales):
            if i > 0:
                x = F.avg_pool1d(x, 4, 2, padding=2)
            scores.append(scale(x))
        return scores


class UNet(nn.Module):
    """Real-ESRGAN's U-Net discriminator (arXiv:2107.10833); spectral norm is on all but its two ends.

    Args:
        c: Channels behind the first convolution (``num_feat``).
    """

    def __init__(self, c: int = 64) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, c, 3, 1, 1)
        self.conv1 = nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(4 * c, 8 * c, 4, 2, 1, bias=False)
        self.conv4 = nn.Conv2d(8 * c, 4 * c, 3, 1, 1, bias=False)
        self.conv5 = nn.Conv2d(4 * c, 2 * c, 3, 1, 1, bias=False)
        self.conv6 = nn.Conv2d(2 * c, c, 3, 1, 1, bias=False)
        self.conv7 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.conv8 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.conv9 = nn.Conv2d(c, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] -> [b, 1, h, w]."""
        x0 = F.leaky_relu(self.conv0(x), 0.2, inplace=True)
        x1 = F.leaky_relu(self.conv1(x0), 0.2, inplace=True)
        x2 = F.leaky_relu(self.conv2(x1), 0.2, inplace=True)
        x = F.leaky_relu(self.conv3(x2), 0.2, inplace=True)
        for conv, skip in ((self.conv4, x2), (self.conv5, x1), (self.conv6, x0)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(conv(x), 0.2, inplace=True) + skip
        x = F.leaky_relu(self.conv7(x), 0.2, inplace=True)
        x = F.leaky_relu(self.conv8(x), 0.2, inplace=True)
        return self.conv9(x)


def mlp(width: int = 256, hidden: int = 6) -> nn.Sequential:
    """The critic of low-dimensional data: 335 617 parameters.

    Args:
        width: Of each hidden layer.
        hidden: Number of hidden layers.
    """
    layers: list[nn.Module] = [nn.Linear(24, width), nn.LeakyReLU(0.2)]
    for _ in range(hidden - 1):
        layers += [nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def patchgan(c: int = 64) -> nn.Sequential:
    """The 70 x 70 PatchGAN of pix2pix (arXiv:1611.07004), which sees a picture and its condition.

    Args:
        c: Channels behind the first convolution (``ndf``).
    """
    return nn.Sequential(
        nn.Conv2d(6, c, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * c),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4 * c),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4 * c, 8 * c, 4, 1, 1, bias=False),
        nn.BatchNorm2d(8 * c),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8 * c, 1, 4, 1, 1),
    )


def sagan_generator(c: int = 64) -> nn.Sequential:
    """The generator of SAGAN (arXiv:1805.08318) at 64 x 64 without labels: transposed convolutions.

    Args:
        c: Channels before the last one.
    """
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise((128, 8 * c, 4 * c, 2 * c, c)):
        stride, padding = (2, 1) if layers else (1, 0)  # 1 pixel to 4 x 4, then twice as many
        conv = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False)
        layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, SelfAttention(c), nn.ConvTranspose2d(c, 3, 4, 2, 1), nn.Tanh())


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on.

    Attributes:
        name: As on the command line.
        make: Builds it, without spectral norm.
        shape: Of one input.
        parameters: How many it has; a model of another size would be measured under a wrong name.
        cpu_batch: Batch on the CPU, where a batch of 64 would leave nothing to see but convolutions.
        cuda_batch: Batch on a GPU.
        classes: Number of labels, if it takes any.
        select: What is normalised, as `specnorm_fx.transform` takes it.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parameters: int
    cpu_batch: int
    cuda_batch: int = 64
    classes: int | None = None
    select: type | tuple[type, ...] | str | None = None

    def batch(self, device: str) -> int:
        """The batch size there."""
        return self.cpu_batch if device == "cpu" else self.cuda_batch

    def inputs(self, batch: int, device: str) -> tuple[Tensor, ...]:
        """One batch of noise."""
        x = torch.randn(batch, *self.shape, device=device)
        if self.classes is None:
            return (x,)
        return x, torch.randint(self.classes, (batch,), device=device)


# The numbers of parameters agree with the published ones where there are such: PatchGAN 2.769 M (the log of
# pix2pix), MSD 29.6 M (HiFi-GAN's discriminators have 70.7 M, of which 41.1 M are the multi-period one),
# Real-ESRGAN's 4 376 897 (its checkpoint), BigGAN-128 87 982 370 (the log of BigGAN-PyTorch).
CASES = {
    case.name: case
    for case in (
        Case("mlp", mlp, (24,), 335_617, cpu_batch=64),
        Case("sngan-32", lambda: SNGAN((128,) * 4, down=2), (3, 32, 32), 1_053_825, cpu_batch=16),
        Case(
            *("sngan-128", lambda: SNGAN((64, 128, 256, 512, 1024, 1024), down=5)),
            *((3, 128, 128), 29_017_857),
            cpu_batch=2,
        ),
        Case("patchgan", patchgan, (6, 128, 128), 2_768_705, cpu_batch=1),
        Case("msd", MSD, (1, 8192), 29_610_627, cpu_batch=2),
        Case("unet", UNet, (3, 128, 128), 4_376_897, cpu_batch=1, select="re:conv[1-8]"),
        Case(
            *("biggan-128", BigGAN, (3, 128, 128), 87_982_370),
            cpu_batch=2,
            classes=1000,
            select=(nn.Conv2d, nn.Linear, nn.Embedding),
        ),
        Case("sagan-generator", sagan_generator, (128, 1, 1), 3_811_204, cpu_batch=4),
    )
}
