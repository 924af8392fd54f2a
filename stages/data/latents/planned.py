"""What is known of latents before they are made: do they fit the data, what do they need and cost."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.latents import shards
from nfm.stages.data.latents.config import LatentsConfig
from nfm.stages.executors import EXECUTORS, ray_cluster
from nfm.stages.trained.costs import Cost, Trial
from nfm.stages.trained.devices.machine import pick_device, threads
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.devices.timing import Clock, rate_of_calls
from nfm.stages.trained.foreign import vae
from nfm.stages.trained.foreign.vae import Vae

if TYPE_CHECKING:
    from torch import Tensor


def external(config: LatentsConfig) -> dict[str, str]:
    """The digest of the VAE, which its path does not tell."""
    return vae.identity(vae_of(config))


def fits(config: LatentsConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where the VAE does not take such images, as far as `facts` tell of the data."""
    if (dtype := facts.get("image_dtype", "uint8")) != "uint8":
        raise Unfit(f"latents.vae = {config.vae!r}: the data's images are {dtype} already, no pixels; leave it out")
    if "image_shape" in facts:
        vae.latent_shape(vae_of(config), facts["image_shape"])


def told(config: LatentsConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the latents before they are made, given the facts of the data; nothing of a function runs."""
    found = {key: value for key, value in facts.items() if key in ("heldout", "classes")}
    if "images" in facts:
        found["images"] = facts["images"] * (2 if config.mirrors else 1)
    shape = vae.latent_shape(vae_of(config), facts["image_shape"]) if "image_shape" in facts else None
    return found | {"image_dtype": shards.DTYPE} | ({} if shape is None else {"image_shape": list(shape)})


def tries(config: LatentsConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where the VAE cannot be loaded, or is not what it should be: a function's code runs here."""
    named = vae_of(config)
    if vae.is_function(named):
        if "image_shape" in facts:
            tried(config, facts["image_shape"], "cpu")
    elif importlib.util.find_spec("diffusers") is None:
        from nfm.trainers.models.autoencoder import INSTALL

        raise Unfit(f"latents.vae = {named!r} is read with diffusers, which is not installed: {INSTALL}")


def needs(config: LatentsConfig) -> None:
    """Raises StageError if something that a run needs is missing: the Ray cluster or the device."""
    executor = EXECUTORS[config.executor]
    if executor.cluster:
        who, without = f'latents.executor = "{config.executor}"', "--set latents.executor=serial"
        ray_cluster.check_reachable(config.ray_address, who, without)
    if not ray_cluster.elsewhere(executor, config.ray_address):
        check_precision(pick_device(config.device), config.precision, "latents.precision")


def room(config: LatentsConfig, facts: Mapping[str, Any]) -> int:
    """The bytes on disk; 0 where the shape of a latent is not known yet."""
    known = told(config, facts)
    if not {"images", "image_shape"} <= known.keys():
        return 0
    return (known["images"] + known.get("heldout", 0)) * math.prod(known["image_shape"]) * 2


def cost(config: LatentsConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """Images to encode, and bytes on disk; where there is a clock also FLOPs and the time, of random images.

    A function is not timed: it is its user's own code, which a plan does not run.
    """
    images, named = told(config, facts)["images"] + facts.get("heldout", 0), vae_of(config)
    found = Cost(images, "images", bytes=room(config, facts) or None)
    if clock is None:
        return found
    if vae.is_function(named):
        return replace(found, unknown="no time (a VAE that is code of its user's own is not run by a plan)")
    try:
        device = pick_device(config.device)
        check_precision(device, config.precision, "latents.precision")
        flops = vae.encode_flops(named, facts["image_shape"])
        trial = Trial(flops, partial(_encoding, config, tuple(facts["image_shape"]), device))
        asked = {"vae": named, "shape": facts["image_shape"], "batch": config.batch_size, "threads": config.threads}
        with threads(config.threads):
            rate = clock.measured(
                "the encoding of images to latents", config.precision, asked,
                lambda: rate_of_calls([trial], config.batch_size, device, config.precision),
            )  # fmt: skip
    except Unfit as error:
        return replace(found, unknown=f"no time ({error})")
    words = "" if device != "cpu" else f"by {config.threads} thread{'s' if config.threads > 1 else ''} of one worker"
    return replace(found, told=words, flops=images * flops, seconds=images / rate)


def _encoding(config: LatentsConfig, image_shape: tuple[int, ...], device: str) -> Callable[[int], Tensor]:
    """A function that encodes a batch of so many random images, as the stage does it, but for their noise."""
    import torch

    loaded = vae.load(vae_of(config), image_shape, config.options, device, config.precision)
    images = torch.rand(config.batch_size, *image_shape) * 2 - 1
    return lambda size: loaded.encode(images[:size]).cpu()


def device_here(config: LatentsConfig) -> str:
    """The device of this process, which with a cluster or an array need not be one of its workers."""
    executor = EXECUTORS[config.executor]
    return pick_device("auto" if executor.cluster or executor.later else config.device)


def vae_of(config: LatentsConfig) -> str:
    if config.vae is None:
        raise Unfit("latents.vae: missing; name the folder of an AutoencoderKL, or a function as `module:function`")
    return config.vae


def tried(config: LatentsConfig, image_shape: tuple[int, int, int], device: str) -> tuple[Vae, tuple[int, int, int]]:
    """The VAE and the shape of its latents, found with two made-up images. Raises Unfit where it is not what it
    should be.
    """
    import torch

    load = partial(vae.load, vae_of(config), image_shape, config.options, device, config.precision)
    try:
        loaded = load()
    except StageError as error:  # of a function that raises, which is wrong use as what it gives is
        raise Unfit(str(error)) from error
    vae.check_weights(loaded, load, str(config.vae))
    scale, shift = (own if given is None else given for given, own in (
        (config.scale, loaded.scale), (config.shift, loaded.shift)))  # fmt: skip
    loaded = replace(loaded, scale=scale, shift=shift)
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise Unfit(
            f"latents.vae = {config.vae!r}: its scale is {scale}, its shift {shift}; set latents.scale and shift"
        )
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return loaded, vae.check(loaded, images, str(config.vae))
