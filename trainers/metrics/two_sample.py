"""A two-sample test by a classifier: can a small network distinguish the noise of a store from new N(0, I) noise?

Classifier two-sample tests, Lopez-Paz & Oquab (arXiv 1610.06545). A student samples from N(0, I). So what the network
finds is new to the student when it samples. The figure is the area under the ROC curve on records that the network was
not trained on: 0.5 is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELDOUT = 0.3  # of the records
BATCH = 128  # records of each kind in a step
EPOCHS = 24
FEWEST_STEPS = 60
RATE, DECAY = 2e-3, 1e-3
LOOKS = 8  # steps between two checks whether to stop
SMALL = 64  # values of a record; with fewer the network does not treat it as an image
WIDTH, SQUARES = 16, 64


@dataclass(frozen=True)
class TwoSample:
    """AUC on `heldout` records and as many of new noise, and its standard error; trained on `trained` records."""

    auc: float
    error: float
    trained: int
    heldout: int
    steps: int


class Critic(nn.Module):
    """The logit that noise [B, C, H, W] with labels [B] comes from a store and is not new.

    It is the sum of two parts. Linear forms of z and of z^2, and their squares, see every variance and covariance at
    any distance. Convolutions see what is local and not Gaussian. Labels shift and scale the features of both. Noise of
    fewer than 64 values goes through a multilayer perceptron instead of convolutions.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        values = channels * height * width
        self.forms = nn.Linear(values, SQUARES)
        self.powers = nn.Linear(values, SQUARES)
        self.head = nn.Linear(3 * SQUARES + 1, 1)
        if values >= SMALL and min(height, width) >= 4:
            stride = 1 if max(height, width) <= 16 else 2 if max(height, width) <= 32 else 4  # limits the cost
            self.first: nn.Module = nn.Conv2d(channels, WIDTH, 2 + stride, stride, padding=1)
            self.rest = nn.Sequential(
                nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, padding=1), nn.ReLU(),
                nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, 2, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * WIDTH, 64), nn.ReLU(), nn.Linear(64, 1),
            )  # fmt: skip
            self.modulated = WIDTH
        else:
            self.first = nn.Sequential(nn.Flatten(), nn.Linear(values, 128))
            self.rest = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))
            self.modulated = 128
        self.label = nn.Embedding(classes, 2 * (self.modulated + SQUARES)) if classes else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Logits [B]."""
        flat = z.flatten(1)
        hidden, forms, powers = self.first(z), self.forms(flat), self.powers(flat.square() - 1)
        if self.label is not None:
            a, b, c, d = self.label(labels).split([self.modulated, self.modulated, SQUARES, SQUARES], dim=1)
            shape = (len(z), self.modulated) + (1,) * (hidden.dim() - 2)
            hidden = hidden * (1 + a.reshape(shape)) + b.reshape(shape)
            forms, powers = forms + c, powers * (1 + d)
        norm = flat.square().mean(1, keepdim=True).sub(1) * math.sqrt(
            flat.shape[1] / 2
        )  # new noise has mean 0, variance 1
        features = torch.cat([forms.square(), powers, powers.square(), norm], dim=1)
        return (self.rest(F.relu(hidden)) + self.head(features)).squeeze(1)


def two_sample(
    z: Tensor,
    labels: Tensor,
    classes: int,
    seed: int = 0,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    most_seen: int = 40_000,
) -> TwoSample | None:
    """Trains a `Critic` on most of the noise z [N, C, H, W] and tests it on the rest.

    z is float32, labels int64 [N] (any value if there are no classes). Training takes `most_seen` records at most, one
    that comes again counted again. None if `stop()` became true first. New noise comes with the same labels, because a
    student draws N(0, I) within each class. Dependent records (two draws of one image) must not both be in z. Raises
    ValueError for fewer than 20 records or values that are not finite.
    """
    if len(z) < 20 or not bool(torch.isfinite(z).all()):
        raise ValueError(f"{len(z)} records, {int((~torch.isfinite(z)).sum())} values not finite; give 20 finite ones")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(z), generator=random)
    heldout, kept = order.split([round(HELDOUT * len(z)), len(z) - round(HELDOUT * len(z))])
    steps = min(most_seen // BATCH, max(FEWEST_STEPS, EPOCHS * len(kept) // BATCH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic((z.shape[1], z.shape[2], z.shape[3]), classes)
    critic.to(device)
    if not _train(critic, z, labels, kept, steps, random, device, stop):
        return None
    fresh = torch.randn(len(heldout), *z.shape[1:], generator=random)
    ours = _logits(critic, z[heldout], labels[heldout], device)
    theirs = _logits(critic, fresh, labels[heldout], device)
    auc, error = area_under_curve(ours, theirs)
    return TwoSample(auc, error, len(kept), len(heldout), steps)


def area_under_curve(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """(AUC, standard error) of scores [m] that should be above scores [n]. Ties count half.

    The error is DeLong's (Biometrics 44, 1988) by placements. It is 0 for completely separated scores; then 1 / (4
    min(m, n)) is used, about the effect of one record.
    """
    above = _placements(positive.double(), negative.double())
    below = 1 - _placements(negative.double(), positive.double())
    variance = sum(float(part.var()) / len(part) for part in (above, below) if len(part) > 1)
    return float(above.mean()), max(math.sqrt(variance), 0.25 / min(len(above), len(below)))


def _placements(scores: Tensor, others: Tensor) -> Tensor:
    """For each score [m], the share of the others [n] that are below it."""
    ranked = others.sort().values
    low, high = (torch.searchsorted(ranked, scores, right=right) for right in (False, True))
    return (low + high).double() / (2 * len(others))


def _train(
    critic: Critic,
    z: Tensor,
    labels: Tensor,
    kept: Tensor,
    steps: int,
    random: torch.Generator,
    device: str,
    stop: Callable[[], bool],
) -> bool:
    """Trains with cross entropy on batches of as many records of z as of new noise, which differs in every step.

    Returns False if `stop()` became true before the last step.
    """
    optimizer = torch.optim.AdamW(critic.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    critic.train()
    for step in range(steps):
        if step % LOOKS == 0 and stop():
            return False
        rows = kept[torch.randint(len(kept), (BATCH,), generator=random)]
        ours, own = z[rows], labels[rows].to(device)
        fresh = torch.randn(ours.shape, generator=random)
        logits = critic(torch.cat([ours, fresh]).to(device), torch.cat([own, own]))
        target = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)]).to(device)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return True


@torch.inference_mode()
def _logits(critic: Critic, z: Tensor, labels: Tensor, device: str) -> Tensor:
    critic.eval()
    parts = zip(z.split(512), labels.split(512))
    return torch.cat([critic(part.to(device), own.to(device)).cpu() for part, own in parts])
