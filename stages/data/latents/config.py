"""The config section [latents]: which VAE, and how its latents are made and stored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from nfm.stages.base import Section, one_of, operational
from nfm.stages.executors import EXECUTORS
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.devices.where import AddressField, DeviceField
from nfm.stages.trained.foreign.vae import is_function
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import local_path


def _named(text: str) -> str:
    if is_function(text):
        return text
    try:
        return str(local_path(text))
    except NoPlace as error:
        raise ValueError(error.reason) from None


VaeField = Annotated[str, AfterValidator(_named)]  # a config field for a local folder or `module:function`


class LatentsConfig(Section):
    """The `[latents]` table. Without `vae` there is no such stage, and everything reads the data itself.

    `vae` is the folder of diffusers' AutoencoderKL, or a function `module:function` with the keywords `options`, see
    trained/foreign/vae.py; it is known by its content. Stored is (latent - `shift`) * `scale`, by default those of the
    VAE's own config. `posterior` "sample" takes one sample of each image's posterior, seeded by its row, as published
    latents are made; "mode" takes its mean. With `mirrors` the training images are encoded as they are and mirrored,
    in rows of their own. `batch_size` is the shape that every batch is padded to. `executor` and what follows say where
    shards are encoded, as in [pairs].
    """

    vae: VaeField | None = operational(None)
    options: dict[str, JsonValue] = Field(default_factory=dict)
    scale: float | None = Field(None, gt=0)
    shift: float | None = Field(None, ge=-100, le=100)
    posterior: Literal["sample", "mode"] = "sample"
    mirrors: bool = False
    seed: int = Field(0, ge=0)
    rows_per_shard: int = Field(4096, ge=1)
    batch_size: int = Field(32, ge=1)
    precision: Precision = "float32"
    executor: Annotated[str, one_of(EXECUTORS)] = operational("ray")
    ray_address: AddressField | None = operational(None)
    workers: int = operational(0, ge=0)
    threads: int = operational(1, ge=1)
    device: DeviceField = operational("auto")

    @model_validator(mode="after")
    def _check_vae(self) -> Self:
        if self.vae is None and (without := sorted(self.model_fields_set & self.semantic().keys())):
            raise ValueError(
                f"{without[0]} is of latents, and without vae there are none: name a VAE as vae, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.options and (self.vae is None or not is_function(self.vae)):
            raise ValueError(
                "options are the keywords of a function, latents.vae = `module:function`, and there is none: leave "
                "them out"
            )
        return self
