"""A VAE, between images and latents: a folder of diffusers' AutoencoderKL, or `module:function`.

    latents.vae(image_shape, **options) -> a VAE in evaluation mode: encode(x) -> (mean, std), both [B, c, h, w], or the
        mean alone; decode(latents) -> x; x float32 [B, C, H, W] in [-1, 1]

Stored is (latent - shift) * scale, of about unit variance. A folder is known by the SHA-256 of its weights and by its
config, never by its path; its two files are copied beside the latents, so that whoever has these can decode. A function
is known by its name and the SHA-256 of its file, and the weights that it loads by those of its first state.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue, ValidationError

from nfm.stages.base import Section, StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.trained.costs import counted
from nfm.stages.trained.devices.precision import Precision, precision_context
from nfm.stages.trained.foreign import own
from nfm.storage.errors import StorageError, by
from nfm.storage.files import atomic
from nfm.storage.files.durable import HashingFile
from nfm.storage.files.small_files import plain, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "latents.vae"
OWN_NUMBERS = {"scale": 1.0, "shift": 0.0}  # attributes of a VAE of one's own, by default
FARTHEST = 10.0  # a decoded value of images in [-1, 1]
BESIDE = 0.05  # of the largest latent: what the images beside it may change, by rounding
FACTS, FOLDER = "latents.json", "vae"  # of an artifact of latents; the folder has the copies of the two files below
KIND, CONFIG, WEIGHTS = "AutoencoderKL", "config.json", "diffusion_pytorch_model.safetensors"
DECODED = 16  # images at a time: activations of a decoder take most of the memory
_FUNCTION = re.compile(r"[^\W\d][\w.]*:\w+")


class VaeFacts(Section):
    """What of an artifact's latents its readers need to make them, or images of them, again."""

    vae: str  # KIND, or `module:function`
    sha256: str  # of the weights and the config, or of the function's file
    options: dict[str, JsonValue]
    state: str | None = None  # of the weights of a function's VAE
    scale: float
    shift: float
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    posterior: Literal["sample", "mode"]
    seed: int
    mirrors: bool
    batch_size: int
    precision: Precision


def is_function(named: str) -> bool:
    """Whether the text names a function of its user's own; anything else is a folder."""
    return _FUNCTION.fullmatch(named) is not None


def identity(named: str) -> dict[str, str]:
    """What decides the latents but is neither config nor artifact. Nothing is run. Raises Unfit where it is missing."""
    if is_function(named):
        file = custom.source_file(named, FIELD)
        custom.check(file, named, FIELD)
        return {"vae": custom.digest(file, FIELD), "function": named}
    return {"vae": digest_of(Path(named))}


def digest_of(folder: Path) -> str:
    """The SHA-256 of a folder's weights and of what its config says of the network."""
    weights = folder / WEIGHTS
    config = config_of(folder)
    try:
        return atomic.digest(atomic.canonical_json({"config": config, "weights": atomic.standing_sha256(weights)}))
    except FileNotFoundError:
        raise Unfit(
            f"{FIELD} = {str(folder)!r}: it has no {WEIGHTS}; save the VAE with save_pretrained(FOLDER), which writes "
            "one file of safetensors; pickles (.bin) are not read, as they may hold code"
        ) from None
    except (OSError, StorageError) as error:
        raise Unfit(f"{FIELD} = {str(folder)!r}: {error}") from error


def config_of(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says of the network, without where it came from. Raises Unfit."""
    said = f"{FIELD} = {str(folder)!r}"
    try:
        body = json.loads(read_bytes(folder / CONFIG))
    except FileNotFoundError:
        name = f"name the folder of an {KIND}, or a function as `module:function`"
        if (folder / FOLDER / CONFIG).is_file():
            name = f"did you mean {folder / FOLDER}?"
        raise Unfit(f"{said}: it has no {CONFIG}; {name}") from None
    except NotADirectoryError:
        raise Unfit(f"{said}: a file; name the function in it, as `{folder.stem}:function`") from None
    except (OSError, StorageError, ValueError, RecursionError) as error:
        raise Unfit(f"{said}: its {CONFIG} cannot be read ({error})") from error
    if not isinstance(body, dict) or body.get("_class_name") != KIND:
        raise Unfit(
            f"{said}: its {CONFIG} is none of an {KIND}, the one kind that is read; wrap others in "
            "a function, `module:function`"
        )
    if body.get("latents_mean") is not None or body.get("latents_std") is not None:
        raise Unfit(
            f"{said}: its latents have a mean and a deviation for each channel, where one shift and scale are stored; "
            "wrap it in a function, `module:function`"
        )
    whole = {name: body.get(name) for name in ("in_channels", "latent_channels")}
    blocks = body.get("block_out_channels")
    if not all(type(value) is int and value > 0 for value in whole.values()) or not isinstance(blocks, list):
        raise Unfit(f"{said}: its {CONFIG} lacks in_channels, latent_channels or block_out_channels; save it again")
    return {key: value for key, value in body.items() if not key.startswith("_") or key == "_class_name"}


def latent_shape(named: str, image_shape: Sequence[int]) -> tuple[int, int, int] | None:
    """The shape of a latent of such images; None of a function, which would have to run. Raises Unfit."""
    if is_function(named):
        return None
    said, config = f"{FIELD} = {named!r}", config_of(Path(named))
    channels, height, width = image_shape
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if channels != config["in_channels"]:
        grey = "; set data.channels = 3" if (channels, config["in_channels"]) == (1, 3) else ""
        raise Unfit(
            f"{said}: it takes images of {config['in_channels']} channels, the data has {by(image_shape)}{grey}"
        )
    if height % factor or width % factor:
        raise Unfit(
            f"{said}: it takes images whose sides are multiples of {factor}, the data has {by(image_shape)}; set "
            "data.image_size"
        )
    return config["latent_channels"], height // factor, width // factor


def encode_flops(folder: str, image_shape: Sequence[int]) -> float:
    """FLOPs to encode one image by a folder's VAE. Raises Unfit where diffusers cannot be imported."""
    from nfm.trainers.models import autoencoder

    try:
        return counted(lambda: autoencoder.Encoder(config_of(Path(folder))), image_shape, with_time=False).flops
    except ImportError as error:
        raise Unfit(f"{FIELD}: {error}") from error


def keep(named: str, out: Path, sha256: str) -> dict[str, tuple[str, int]]:
    """Copies a folder's two files beside the latents; gives (sha256, bytes) by their paths. None of a function.

    Raises StageError where they are not those of this digest any more.
    """
    if is_function(named):
        return {}
    folder, files = Path(named), (CONFIG, WEIGHTS)
    atomic.write_bytes(out / FOLDER / CONFIG, (json.dumps(config_of(folder), indent=2) + "\n").encode())
    with HashingFile(out / FOLDER / WEIGHTS) as copy, plain(folder / WEIGHTS) as weights:
        shutil.copyfileobj(weights, copy)
    if digest_of(out / FOLDER) != sha256:
        raise StageError(f"{FIELD} = {named!r}: it changed while it was read; run again when nobody writes to it")
    return {f"{FOLDER}/{file}": atomic.hash_file(out / FOLDER / file) for file in files}


@dataclass(frozen=True)
class Vae:
    """A VAE on a device, for float32 images [B, C, H, W] in [-1, 1] and latents [B, c, h, w] as they are stored."""

    encoder: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    decoder: Callable[[Tensor], Tensor]
    scale: float
    shift: float
    device: str
    precision: Precision
    state: str | None = None

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """(mean + std eps - shift) scale, float32 on the device; the mode of the posterior without `eps`."""
        import torch

        with torch.inference_mode(), precision_context(torch.device(self.device).type, self.precision):
            mean, std = self.encoder(images.to(self.device))
        latents = mean.float() if eps is None or std is None else mean.float() + std.float() * eps.to(self.device)
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] of stored latents, on the device; a few at a time."""
        import torch

        found = latents.to(self.device).float() / self.scale + self.shift
        with torch.inference_mode(), precision_context(torch.device(self.device).type, self.precision):
            return torch.cat([self.decoder(part).float() for part in found.split(DECODED)])


def load(
    named: str, image_shape: Sequence[int], options: Mapping[str, Any], device: str, precision: Precision,
    sha256: str | None = None,
) -> Vae:  # fmt: skip
    """The VAE with the scale and the shift that are its own. The code of a function runs here.

    Raises StageError where its file has another digest than `sha256`, Unfit where it cannot be loaded.
    """
    if is_function(named):
        return _own(named, image_shape, options, device, precision, sha256)
    from nfm.trainers.models import autoencoder

    config = config_of(Path(named))
    try:
        model = autoencoder.load(Path(named)).to(device)
    except (ImportError, ValueError) as error:
        raise Unfit(f"{FIELD}: {error}") from error
    encode, decode = partial(autoencoder.encode, model), partial(autoencoder.decode, model)
    scale, shift = (config.get(name) for name in ("scaling_factor", "shift_factor"))
    return Vae(encode, decode, float(scale or 1.0), float(shift or 0.0), device, precision)


def _own(
    named: str, image_shape: Sequence[int], options: Mapping[str, Any], device: str, precision: Precision,
    sha256: str | None,
) -> Vae:  # fmt: skip
    from torch import nn

    file = custom.source_file(named, FIELD)
    function = custom.load(file, named, sha256 or custom.digest(file, FIELD), FIELD)
    try:
        inspect.signature(function).bind(tuple(image_shape), **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(["the image's shape", *options])
        raise Unfit(f"{FIELD} = {named!r}: it cannot be called with {given}: {error}") from error
    made = function(tuple(image_shape), **options)
    if not callable(getattr(made, "encode", None)) or not callable(getattr(made, "decode", None)):
        raise Unfit(f"{FIELD} = {named!r}: returned {type(made).__name__}; return one that has encode and decode")
    state = None
    if isinstance(made, nn.Module):
        state, made = _state(made), made.eval().requires_grad_(False).to(device)

    def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
        return _mean_and_deviation(made.encode(images), f"{FIELD} = {named!r}")

    scale, shift = (_number(named, name, getattr(made, name, default)) for name, default in OWN_NUMBERS.items())
    return Vae(encode, made.decode, scale, shift, device, precision, state)


def _number(named: str, name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool):  # which float() takes
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise Unfit(f"{FIELD} = {named!r}: its {name} is {str(value)[:40]!r}; give a number") from None


def _mean_and_deviation(found: Any, said: str) -> tuple[Tensor, Tensor | None]:
    """What `encode` of one's own gave. Raises Unfit where it is something else."""
    from torch import Tensor

    mean, std = found if isinstance(found, tuple | list) and len(found) == 2 else (found, None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor | None):
        what = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise Unfit(f"{said}: encode gave {what}; give the mean, or (mean, deviation), as tensors [B, c, h, w]")
    for tensor in (mean, *(() if std is None else (std,))):
        if not tensor.is_floating_point():
            raise Unfit(f"{said}: encode gave {str(tensor.dtype).removeprefix('torch.')}; give floats [B, c, h, w]")
    if std is not None and std.shape != mean.shape:
        raise Unfit(f"{said}: encode gave a mean {by(mean.shape)} and a deviation {by(std.shape)}; give both one shape")
    if std is not None and (std < 0).any():
        raise Unfit(
            f"{said}: encode gave a deviation of {float(std.min()):.4g}; it is at least 0: of a log-variance give "
            "(logvar / 2).exp()"
        )
    return mean, std


def check(vae: Vae, images: Tensor, named: str) -> tuple[int, int, int]:
    """The shape of a latent of two made-up images. Raises Unfit where the VAE does not encode and decode them."""
    import torch

    said = f"{FIELD} = {named!r}"
    with own.blaming_code(f"{said}: cannot encode images of {by(images.shape[1:])}: it", "mend it"):
        latents = vae.encode(images)
    if latents.dim() != 4 or len(latents) != len(images):
        raise Unfit(f"{said}: encode gave {by(latents.shape)} for two images; give floats [B, c, h, w]")
    if not latents.isfinite().all():
        raise Unfit(f"{said}: encode gave values that are not finite; mend its weights, or train it in float32")
    if not (latents != latents[0, 0, 0, 0]).any():
        raise Unfit(f"{said}: encode gave one value everywhere; mend its weights")
    with own.blaming_code(f"{said}: cannot encode one image: it", "mend it"):
        alone = vae.encode(images[:1])
    grey = images.new_full((2, *images.shape[1:]), 0.5)  # of another mean and deviation than the image
    among = vae.encode(torch.cat([grey, images[:1]]))[2:]
    if any((alone - other).abs().max() > BESIDE * latents.abs().max() for other in (latents[:1], among)):
        raise Unfit(f"{said}: an image's latent depends on the images beside it; encode each by itself, in eval mode")
    with own.blaming_code(f"{said}: cannot decode latents of {by(latents.shape[1:])}: it", "mend it"):
        back = vae.decode(latents)
    if back.shape != images.shape:
        raise Unfit(f"{said}: decode gave {by(back.shape)} for {by(images.shape)}; give images of that shape")
    if not back.isfinite().all():
        raise Unfit(f"{said}: decode gave values that are not finite; mend its weights, or train it in float32")
    if (largest := float(back.abs().max())) > FARTHEST:
        raise Unfit(f"{said}: decode gave values up to {largest:.3g}; give images in [-1, 1]")
    _, channels, height, width = latents.shape
    return channels, height, width


def check_weights(vae: Vae, load_again: Callable[[], Vae], named: str) -> None:
    """Raises Unfit where a function gives a network of other weights at each call, as each worker makes one."""
    if vae.state is not None and load_again().state != vae.state:
        raise Unfit(
            f"{FIELD} = {named!r}: it gives other weights each time it is called, and every worker calls it; load them "
            "from a file in it, or call torch.manual_seed first"
        )


def announce(named: str, say: Callable[[str], None]) -> None:
    """Says whose code is about to run, if the VAE is of a function."""
    if is_function(named):
        own.announce({FIELD: named}, say)


def recorded(folder: Path) -> dict[str, tuple[str, str]]:
    """The function that decoding an artifact of latents runs, with its digest, by field."""
    facts = read_facts(folder)
    return {FIELD: (facts.vae, facts.sha256)} if is_function(facts.vae) else {}


def of_artifact(folder: Path, device: str) -> tuple[Vae, VaeFacts]:
    """The VAE that made an artifact of latents, and what it was made with. The code of a function runs here.

    Raises StageError where the VAE is not the one that made them.
    """
    facts = read_facts(folder)
    function = is_function(facts.vae)
    if not function and digest_of(folder / FOLDER) != facts.sha256:
        raise StageError(f"{folder / FOLDER}: not the VAE that made these latents; restore its files from a copy")
    named = facts.vae if function else str(folder / FOLDER)
    vae = load(named, facts.image_shape, facts.options, device, facts.precision, facts.sha256)
    if vae.state != facts.state:
        raise StageError(
            f"{FIELD} = {facts.vae!r}: the weights that it loads are not those that made the latents in {folder}; "
            "restore its file of weights"
        )
    return replace(vae, scale=facts.scale, shift=facts.shift), facts


def read_facts(folder: Path) -> VaeFacts:
    """What an artifact of latents was made with. Raises StorageError, StageError."""
    body = atomic.read_json(folder / FACTS)
    del body["digest"]
    try:
        return VaeFacts.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        raise StageError(f"{folder / FACTS}: {problem['loc']}: {problem['msg']}; restore it from a copy") from None


def _state(network: Any) -> str:
    """The SHA-256 of all weights of a network, by name."""
    import torch

    sha = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        sha.update(f"{name} {value.dtype} {by(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
