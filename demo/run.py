"""Train a spectrally normalised GAN on scikit-learn's handwritten digits, and export its critic.

    python demo/run.py [--steps 3000] [--out demo]

The critic is a plain module: `specnorm_fx.transform` puts spectral norm on it, `torch.compile` makes
one graph of it, `specnorm_fx.onnx.export` a verified file, which export/score.py scores without torch.
"""

import argparse
import copy
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

import specnorm_fx
from specnorm_fx.atomic import replaced

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEMO = Path(__file__).parent
SCORE = DEMO.parent / "export" / "score.py"
GAUSS, CODES, CODE_SCALE = 16, 40, 4.0  # latent: 16 Gaussian numbers + a scaled one-hot of 40 codes
BATCH = 128


class Generator(nn.Sequential):
    def __init__(self, width: int = 384):
        layers, n = [], GAUSS + CODES
        for _ in range(3):
            layers += [nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU()]
            n = width
        super().__init__(*layers, nn.Linear(n, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))


class Critic(nn.Module):
    """Nothing in it knows of spectral norm."""

    def __init__(self, channels: int = 32, width: int = 256, gain: float = 4.0):
        super().__init__()
        self.gain = gain  # stretches the images: the critic's Lipschitz constant in pixel units
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten()),
            *(nn.Linear(16 * channels, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2)),
            nn.Linear(width, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(self.gain * image)


def load() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Training and held-out digits [n, 1, 8, 8] in grey levels 0..16, and their labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)


def to_unit(levels: Tensor, noise: Tensor | float = 0.5) -> Tensor:
    """Levels 0..16 to (-1, 1); noise in [0, 1) dequantises, 0.5 is the middle of the level."""
    return (levels + noise) / 17 * 2 - 1


def to_levels(x: Tensor) -> Tensor:
    return ((x + 1) / 2 * 17).floor().clamp(0, 16)


def latent(n: int, rng: torch.Generator | None = None) -> Tensor:
    code = torch.randint(CODES, (n,), generator=rng)
    return torch.cat([torch.randn(n, GAUSS, generator=rng), CODE_SCALE * F.one_hot(code, CODES)], 1)


class Trace:
    """Sigma and the exact largest singular value of every layer, over the training."""

    def __init__(self, critic: nn.Module):
        self.critic = critic
        self.names = list(specnorm_fx.sigmas(critic))
        self.steps: list[int] = []
        self.sigma: list[list[float]] = []
        self.exact: list[list[float]] = []

    @torch.no_grad()
    def record(self, step: int) -> None:
        weights = [self.critic.get_parameter(name).flatten(1) for name in self.names]
        self.steps.append(step)
        self.sigma.append([sigma.item() for sigma in specnorm_fx.sigmas(self.critic).values()])
        self.exact.append([torch.linalg.matrix_norm(weight, 2).item() for weight in weights])


def train(
    real: Tensor, critic: nn.Module, generator: nn.Module, steps: int, writer: SummaryWriter
) -> tuple[nn.Module, Trace]:
    """Hinge loss, one critic step to one generator step; the generator's moving average, and sigma."""
    average, trace = copy.deepcopy(generator), Trace(critic)
    log = specnorm_fx.SigmaLogger(writer, critic)
    # One graph for each of its two uses: D(real, fake), and D(G(z)) without gradients of the critic.
    compiled = torch.compile(critic, dynamic=False)
    opt_d = torch.optim.Adam(critic.parameters(), 4e-4, betas=(0.0, 0.9))
    opt_g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.0, 0.9))
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, steps) for o in (opt_d, opt_g)]
    for step in (bar := trange(steps, desc="training", mininterval=0.5)):
        levels = real[torch.randint(len(real), (BATCH,))]
        with torch.no_grad():
            fake = generator(latent(BATCH))
        images = torch.cat([to_unit(levels, torch.rand_like(levels)), fake])
        score_real, score_fake = compiled(images).chunk(2)
        loss_d = F.relu(1 - score_real).mean() + F.relu(1 + score_fake).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        critic.requires_grad_(False)
        loss_g = -compiled(generator(latent(BATCH))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        critic.requires_grad_(True)

        for schedule in schedules:
            schedule.step()
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), generator.state_dict().values(), strict=True):
                a.lerp_(b, 0.005) if a.is_floating_point() else a.copy_(b)
        log(step)
        if step % 50 == 0 or step == steps - 1:
            trace.record(step)
            bar.set_postfix(loss_d=f"{loss_d.item():.2f}", loss_g=f"{loss_g.item():.2f}", refresh=False)
    log.flush()
    return average.eval(), trace


def score(out: Path, name: str, levels: Tensor, critic: nn.Module) -> float:
    """Mean score by export/score.py, in a process without torch; it must equal that of the critic here."""
    images = to_unit(levels)
    with replaced(out / f"{name}.npy") as written:
        np.save(written, images.numpy())
    command = [sys.executable, SCORE, out / "critic.onnx", out / f"{name}.npy", "--format", "jsonl"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    scores = [json.loads(line)["score"] for line in result.stdout.splitlines()]
    with torch.no_grad():
        np.testing.assert_allclose(scores, critic(images).flatten().numpy(), rtol=0, atol=1e-5)
    return float(np.mean(scores))


def learned_digits(levels: Tensor, labels: np.ndarray) -> CalibratedClassifierCV:
    svc = CalibratedClassifierCV(SVC(C=10, gamma=0.16), ensemble=False)
    return svc.fit(levels.flatten(1).numpy() / 16, labels)


def inception_score(levels: Tensor, classifier: CalibratedClassifierCV) -> float:
    """From 1 to 10: high where the classifier is sure of each image, and finds all ten digits."""
    p = classifier.predict_proba(levels.flatten(1).numpy() / 16).clip(1e-12)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def draw_digits(levels: Tensor, path: Path, rows: int = 8, columns: int = 12) -> None:
    tiles = F.pad(levels[: rows * columns], (1, 1, 1, 1)).view(rows, columns, 10, 10)
    picture = tiles.permute(0, 2, 1, 3).reshape(rows * 10, columns * 10)
    with replaced(path) as written:
        plt.imsave(written, np.kron(picture.numpy(), np.ones((8, 8))), cmap="gray", vmin=0, vmax=16)


def draw_sigmas(trace: Trace, path: Path) -> None:
    """A column for each layer: sigma against the exact value above, their relative difference below."""
    sigma, exact, n = np.array(trace.sigma), np.array(trace.exact), len(trace.names)
    figure, axes = plt.subplots(2, n, sharex=True, sharey="row", figsize=(3.2 * n, 5), layout="constrained")
    for i, (above, below) in enumerate(axes.T):
        above.set_title(trace.names[i])
        above.plot(trace.steps, exact[:, i], color="0.6", linewidth=4, label="exact, by SVD")
        above.plot(trace.steps, sigma[:, i], color="C3", label="sigma, by one power iteration a forward")
        below.semilogy(trace.steps, np.abs(1 - sigma[:, i] / exact[:, i]).clip(1e-8), color="C3")
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("largest singular value")
    axes[1, 0].set_ylabel("relative difference")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    with replaced(path) as written:
        figure.savefig(written, dpi=110)
    plt.close(figure)


def table(*rows: tuple[str, ...]) -> str:
    """In Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if the critic does not score held-out digits above shuffled ones and noise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for the results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(0)
    # The layers are small: two threads gain little on an idle machine, and on a busy one each waits for the
    # other at every operation (seen: 1.4 s a step instead of 0.03).
    torch.set_num_threads(1)

    # 1. Train.
    real, heldout, labels, _ = load()
    generator, critic = Generator(), specnorm_fx.transform(Critic())
    with SummaryWriter(args.out / "runs") as writer:
        average, trace = train(real, critic, generator, args.steps, writer)

    # 2. Freeze and export.
    critic.eval()
    example = to_unit(heldout)
    assert torch.equal(specnorm_fx.freeze(critic)(example), critic(example))
    verification = specnorm_fx.onnx.export(critic, example, args.out / "critic.onnx", dynamic_batch=True)

    # 3. Score digits that the critic has never seen, what the generator makes, and what are no digits.
    rng = torch.Generator().manual_seed(1)
    order = torch.rand(len(heldout), 64, generator=rng).argsort(1)
    with torch.no_grad():
        images = {
            "heldout": heldout,
            "generated": to_levels(average(latent(1000, rng))),
            "shuffled": heldout.flatten(1).gather(1, order).view_as(heldout),
            "noise": torch.randint(0, 17, heldout.shape, generator=rng).float(),
        }
    means = {name: score(args.out, name, levels, critic) for name, levels in images.items()}
    svc = learned_digits(real, labels)
    quality = {name: inception_score(levels, svc) for name, levels in images.items()}

    # 4. What to look at.
    draw_digits(images["generated"], args.out / "digits.png")
    draw_sigmas(trace, args.out / "sigma.png")
    rows = specnorm_fx.report(critic).rows
    sections = [
        "# A spectrally normalised GAN on handwritten digits",
        f"{args.steps} steps, {time.perf_counter() - start:.0f} s in all with compilation and export; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}.",
        table(("weight", "sigma", "exact"), *((r.fqn, f"{r.sigma:.4f}", f"{r.exact:.4f}") for r in rows)),
        str(dataclasses.replace(verification, path=Path("critic.onnx"))),
        table(
            ("images", "mean score by critic.onnx", "inception score by an SVC"),
            *((name, f"{means[name]:.3f}", f"{quality[name]:.2f}") for name in images),
        ),
    ]
    summary = "\n\n".join(sections) + "\n"
    with replaced(args.out / "summary.md") as written:
        written.write_text(summary)
    print(summary)
    return 0 if means["heldout"] > max(means["shuffled"], means["noise"]) else 1


if __name__ == "__main__":
    sys.exit(main())
