"""The audit of latents beyond their own files: are they of their data, row by row, and does their VAE make them?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from nfm.stages.base import Finding, Inputs, StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.data.latents.shards import SPLITS, Images, LatentEncoder
from nfm.stages.display import units
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.foreign import vae
from nfm.stages.trained.foreign.vae import VaeFacts
from nfm.storage import ImageDataset

CHUNK = 4096  # rows in memory at a time
# RMS over a row of the stored latent minus the latent encoded again, as a part of the RMS of all. float16 rounds to
# 2^-11 relative; products in bfloat16 on another device move a latent by a few hundredths.
TOLERANCE = {"float32": 0.01, "tf32": 0.03, "bfloat16": 0.1}
_AGAIN = "move the folder away and run the latents stage again"

_ENCODED = f"{_AGAIN}; if it stays so, a latent depends on the images that are encoded beside it: mend the VAE"


def audit(
    inputs: Inputs,
    folder: Path,
    level: Literal["quick", "default", "deep"],
    sample: int,
    allowed: custom.Allowed = custom.NOBODYS,
) -> tuple[list[Finding], list[str]]:
    """Compares labels, keys and captions of every row with the data, and at `deep` encodes a seeded sample again.

    A VAE that is its user's own function is code. It runs only if `allowed` has its digest; otherwise a statement says
    that it did not.
    """
    if level == "quick" or "data" not in inputs:
        return [], []
    facts = vae.read_facts(folder)
    findings = _of_other_data(folder, Images(inputs["data"], facts))
    if level == "default" or findings:
        return findings, []
    for function, sha256 in vae.recorded(folder).values():
        if sha256 not in allowed.digests:
            return [], [custom.not_run("its images were not encoded again", function, sha256, allowed)]
    vae.announce(facts.vae, allowed.say)
    try:
        return encode_again(folder, inputs["data"], facts, sample)
    except StageError as error:
        if isinstance(error, Unfit) and not vae.is_function(facts.vae):
            return [], [f"its images were not encoded again: {error}"]  # diffusers is not installed
        return [Finding(str(folder / vae.FACTS), f"its latents cannot be made again: {error}", _AGAIN)], []


def _of_other_data(folder: Path, images: Images) -> list[Finding]:
    findings = []
    for split in SPLITS:
        latents, rows, wrong = ImageDataset.open(folder, split), images.rows(split), []
        if len(latents) != rows:
            problem = f"{split} has {len(latents)} rows, the data gives {rows}"
            findings.append(Finding(str(folder / split), problem, _AGAIN))
            continue
        for start in range(0, rows, CHUNK):
            part = np.arange(start, min(start + CHUNK, rows))
            captions = latents.captions(part) if latents.captioned else None
            if not np.array_equal(latents.labels(part), images.labels(split, part)):
                wrong.append("labels")
            if latents.keys(part) != images.keys(split, part):
                wrong.append("keys")
            if captions != images.captions(split, part):
                wrong.append("captions")
        if wrong:
            problem = f"its {' and '.join(sorted(set(wrong)))} are not those of the data"
            findings.append(Finding(str(folder / split), problem, _AGAIN))
    return findings


def encode_again(
    folder: Path, data: Path, facts: VaeFacts, count: int, seed: int = 0
) -> tuple[list[Finding], list[str]]:
    """Encodes a seeded sample of training rows again, in float32 where this device lacks the precision of old."""
    device = pick_device("auto")
    encoder = LatentEncoder(folder, data, device)
    try:
        check_precision(device, facts.precision)
    except Unfit:  # a device that computes more exactly, within the same tolerance
        encoder.compute_in("float32")
    latents = ImageDataset.open(folder, "train")
    picked = np.sort(np.random.default_rng(seed).choice(len(latents), size=min(count, len(latents)), replace=False))
    stored = latents.images(picked).astype(np.float32)
    again = np.empty_like(stored)
    # Beside other rows than at first, half a batch at a time, which its last row fills: a latent that depends on those
    # beside it becomes another.
    for start in range(parts := -(-len(picked) // max(1, facts.batch_size // 2))):
        again[start::parts] = encoder.latents("train", picked[start::parts])
    apart = np.sqrt(np.square(again - stored).mean((1, 2, 3)) / max(float(np.square(stored).mean()), 1e-12))
    bad = picked[apart > TOLERANCE[facts.precision]]
    findings = [
        Finding(str(folder / "train"), f"row {row} is not the latent that its VAE makes of its image", _ENCODED)
        for row in bad.tolist()
    ]
    said = (
        f"{len(bad)} of {len(picked)} latents bad: {units.at_most(len(bad), len(picked))}; encoded again within "
        f"{apart.max():.2g} (RMS of the worst row, as a part of the RMS of all; {TOLERANCE[facts.precision]:g} allowed)"
    )
    return findings, [said]
