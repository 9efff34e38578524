"""Checks of configurations that families share: what passes, and what is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from latentrt.engines.errors import SourceError
from latentrt.exporter.families.checks import (
    check_blocks,
    check_clip,
    check_guidance,
    check_size,
    check_unet_channels,
    check_vae,
    inpaints,
    natural,
    naturals,
)

VAE = {"latent_channels": 4, "scaling_factor": 0.5}


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None, [8]])
def test_numbers_are_whole_and_above_zero(value: Any) -> None:
    """Anything else is named with its file; an entry that is missing has the default."""
    assert natural("unet", {}, "heads", 8) == 8
    assert natural("unet", {"heads": 3}, "heads", 8) == 3
    with pytest.raises(SourceError, match=r"^unet/config.json: 'heads' is"):
        natural("unet", {"heads": value}, "heads", 8)


@pytest.mark.parametrize("value", [[], [1, 2, 3, 4], [0], [9], [1.0], [True], 1, None, "12"])
def test_lists_of_numbers_are_bounded(value: Any) -> None:
    """They have neither too many entries nor too large ones; a list that passes is a copy."""
    default = [1, 2]
    found = naturals("unet", {}, "widths", default, 3, 8)
    assert found == default
    assert found is not default
    assert naturals("unet", {"widths": [8, 8, 8]}, "widths", default, 3, 8) == [8, 8, 8]
    with pytest.raises(SourceError, match=r"'widths' is .*, expected 1 to 3 whole numbers up to 8$"):
        naturals("unet", {"widths": value}, "widths", default, 3, 8)


def test_what_passes() -> None:
    """Configurations of models that there are, with latents alone, for inpainting, and with an embedded scale."""
    check_blocks("unet", {"block_out_channels": [320, 640, 1280, 1280]})
    check_guidance({})
    check_guidance({"time_cond_proj_dim": 256})
    assert check_clip("text_encoder", {"hidden_size": 1024}) == 1024
    check_unet_channels({"in_channels": 4}, VAE)
    check_unet_channels({"in_channels": 9}, VAE)
    check_vae({"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06}, 16)
    check_size("unet", {}, 8)
    check_size("unet", {"sample_size": [64, 96]}, 8)
    assert [inpaints({"in_channels": channels}, VAE) for channels in (4, 8, 9)] == [False, False, True]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_blocks("vae", {}), "'block_out_channels' is None, expected a list of 1 to 7"),
        (lambda: check_blocks("vae", {"block_out_channels": [8] * 8}), "expected a list of 1 to 7"),
        (lambda: check_guidance({"time_cond_proj_dim": 3}), "'time_cond_proj_dim' is 3, expected 4 or more"),
        (lambda: check_clip("text", {"vocab_size": 0}), "text/config.json: 'vocab_size' is 0"),
        (lambda: check_unet_channels({"in_channels": 8}, VAE), "have 4 channels, but the U-Net takes 8; U-Nets for"),
        (lambda: check_unet_channels({"in_channels": 9, "time_cond_proj_dim": 8}, VAE), "takes the guidance scale"),
        (lambda: check_vae({**VAE, "latents_std": [1]}, 4), "has means or deviations of its latents"),
        (lambda: check_vae({**VAE, "scaling_factor": 0}, 4), "'scaling_factor' is 0"),
        (lambda: check_vae({**VAE, "scaling_factor": float("nan")}, 4), "'scaling_factor' is nan"),
        (lambda: check_vae({**VAE, "shift_factor": "1"}, 4), "'shift_factor' '1'"),
        (lambda: check_size("unet", {"sample_size": 10**6}, 8), "'sample_size' is 1000000"),
        (lambda: check_size("unet", {"sample_size": [64, 64, 64]}, 8), "expected one or two whole numbers"),
    ],
)
def test_what_is_refused(check: Callable[[], object], message: str) -> None:
    """The sentence names the entry and its value."""
    with pytest.raises(SourceError) as caught:
        check()
    assert message in str(caught.value)
