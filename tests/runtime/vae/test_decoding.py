"""The decoder of images: how pixels are rounded, and how latents are scaled before they reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentrt.engines import Array, FakeEngine
from latentrt.runtime import Bundle, Pipeline


def test_a_preview_is_a_decoded_step(plain_model: Any, pipe: Pipeline) -> None:
    """decode takes what a step yields; the last preview is the picture."""
    steps, result = plain_model.finish(pipe.stream("a red apple", steps=3, seed=1))
    assert pipe.decode(steps[0].latents).shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(pipe.decode(steps[-1].latents), result.images)


def test_pixels_are_rounded_and_clipped(plain_model: Any, bundle: Bundle) -> None:
    """-1 to 1 becomes 0 to 255, half to even as diffusers rounds, everything outside is clipped."""
    values = np.array([-7, -1, -1 + 2 / 255, 0, 0.5, 1 - 2 / 255, 1, 9], np.float32)

    def constant(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"sample": np.broadcast_to(values, (1, 3, 1, 8))}

    pixels = Pipeline(bundle, plain_model.fakes(vae=constant)).decode(np.zeros((1, 4, 1, 1), np.float32))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 1, 128, 191, 254, 255, 255]


def test_latents_are_unscaled_before_decoding(pipe: Pipeline, engines: dict[str, FakeEngine], bundle: Bundle) -> None:
    """The decoder gets latents divided by the bundle's scaling factor."""
    pipe.decode(np.ones((1, 4, 2, 2), np.float32))
    np.testing.assert_allclose(
        engines["vae_decoder"].calls[0]["latent_sample"], 1 / bundle.manifest.latent.scaling, rtol=1e-6
    )
