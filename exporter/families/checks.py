"""Checks of configurations that families share; each raises a :class:`~latentrt.engines.errors.SourceError`."""

from __future__ import annotations

from latentrt.engines.checks import check_integer, is_integer, is_number, show
from latentrt.engines.errors import SourceError
from latentrt.runtime.request.options import MAX_SIDE

from .base import Config

_LEAST_EMBEDDING = 4  # two frequencies, whose ratio divides by one less than their number
_MAX_BLOCKS = 7  # six halvings: a latent is then 64 pixels wide


def natural(where: str, config: Config, key: str, default: int) -> int:
    """A whole number above zero from a configuration.

    Args:
        where: Name of the folder that the configuration is in, for the message.
        config: The configuration.
        key: Its entry.
        default: The number where there is no such entry.

    Raises:
        SourceError: if it is anything else.
    """
    return check_integer(f"{where}/config.json: {key!r}", config.get(key, default), 1, error=SourceError)


def naturals(where: str, config: Config, key: str, default: list[int], longest: int, most: int) -> list[int]:
    """A list of whole numbers above zero from a configuration, of one entry at least.

    Args:
        where: Name of the folder that the configuration is in, for the message.
        config: The configuration.
        key: Its entry.
        default: The list where there is no such entry.
        longest: How many numbers it may have.
        most: The largest number that is allowed.

    Raises:
        SourceError: if it is anything else.
    """
    values = config.get(key, default)
    sound = isinstance(values, list) and 1 <= len(values) <= longest
    if not sound or not all(is_integer(value) and 1 <= value <= most for value in values):
        raise SourceError(
            f"{where}/config.json: {key!r} is {show(values)}, expected 1 to {longest} whole numbers up to {most}"
        )
    return list(values)


def check_blocks(where: str, config: Config) -> None:
    """Check the widths of a U-Net's or a VAE's levels.

    Raises:
        SourceError: if there are none or too many.
    """
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_BLOCKS:
        raise SourceError(
            f"{where}/config.json: 'block_out_channels' is {blocks!r}, expected a list of 1 to {_MAX_BLOCKS}"
        )


def check_guidance(unet: Config) -> None:
    """Check the input for the guidance scale of a U-Net that takes it, as latent consistency models do.

    Raises:
        SourceError: if the width of that input is none that a scale can be embedded in.
    """
    if unet.get("time_cond_proj_dim") is not None:
        width = natural("unet", unet, "time_cond_proj_dim", 256)
        if width < _LEAST_EMBEDDING:
            raise SourceError(f"unet/config.json: 'time_cond_proj_dim' is {width}, expected {_LEAST_EMBEDDING} or more")


def check_clip(where: str, config: Config) -> int:
    """Check a CLIP text encoder, and return the width of its states.

    Raises:
        SourceError: if a number is missing or not above zero.
    """
    for key, default in (("max_position_embeddings", 77), ("vocab_size", 49408), ("num_hidden_layers", 12)):
        natural(where, config, key, default)
    return natural(where, config, "hidden_size", 512)


def inpaints(unet: Config, vae: Config) -> bool:
    """Whether a U-Net takes a mask and the latents of the masked image after the latents."""
    channels = natural("vae", vae, "latent_channels", 4)
    return natural("unet", unet, "in_channels", 4) == 2 * channels + 1


def check_unet_channels(unet: Config, vae: Config) -> None:
    """Check that a U-Net takes the VAE's latents, alone or for inpainting.

    Raises:
        SourceError: if it does not, or if it is one for inpainting that takes the guidance scale too.
    """
    if not inpaints(unet, vae):
        check_vae(vae, natural("unet", unet, "in_channels", 4))
        return
    check_vae(vae, natural("vae", vae, "latent_channels", 4))
    if unet.get("time_cond_proj_dim") is not None:
        raise SourceError("unet/config.json: a U-Net for inpainting that takes the guidance scale is not supported")


def check_vae(vae: Config, channels: int, denoiser: str = "U-Net") -> None:
    """Check the latents of a VAE; its blocks must have been checked.

    Args:
        vae: Its configuration.
        channels: Channels of the latents that the denoiser takes.
        denoiser: A word for the denoiser, for messages.

    Raises:
        SourceError: if its latents have another number of channels, or are scaled in a way that is not known.
    """
    latents = natural("vae", vae, "latent_channels", 4)
    if latents != channels:
        raise SourceError(
            f"the VAE's latents have {latents} channels, but the {denoiser} takes {channels}; "
            f"{denoiser}s for editing, which take more, are not supported"
        )
    if any(vae.get(key) is not None for key in ("latents_mean", "latents_std")):
        raise SourceError(
            "vae/config.json has means or deviations of its latents; only a scaling and a shift are supported"
        )
    scaling, shift = vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0
    if not is_number(scaling) or not is_number(shift) or not 1e-6 <= scaling <= 1e6:
        raise SourceError(
            f"vae/config.json: 'scaling_factor' is {scaling!r} and 'shift_factor' {shift!r}, expected two numbers"
        )


def check_size(where: str, config: Config, factor: int) -> None:
    """Check the size of latents that a denoiser was trained on.

    Raises:
        SourceError: if an image of that size would be too large.
    """
    side = config.get("sample_size") or 64
    sides = side if isinstance(side, list) and len(side) == 2 else [side]
    if not all(is_integer(s) and 1 <= s * factor <= MAX_SIDE for s in sides):
        raise SourceError(
            f"{where}/config.json: 'sample_size' is {side!r}, "
            f"expected one or two whole numbers up to {MAX_SIDE // factor}"
        )
