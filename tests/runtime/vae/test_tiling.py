"""Tiled decoding and encoding against diffusers' ``enable_tiling``, and against the whole picture."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import EngineError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline, Tiling
from latentrt.runtime.components.engine_choice import EngineSettings, make_engine
from latentrt.runtime.engine_calls import Floats
from latentrt.runtime.vae.tiling import EDGES, decode_tiles, encode_tiles

GATE = 45.0
"""Least PSNR in dB beside diffusers."""
SIZES = ((32, 32), (40, 28), (30, 19), (33, 12))
"""Heights and widths in latents; tiles are 16 of them: steps that fit, that do not, slivers, and one row of tiles."""
TILE = 16


@dataclass(frozen=True)
class Vae:
    """One autoencoder, opened here and in diffusers."""

    decoder: Engine
    encoder: Engine
    theirs: Any
    factor: int
    channels: int
    scaling: float

    def latents(self, height: int, width: int) -> Floats:
        values = np.random.default_rng(0).standard_normal((2, self.channels, height, width))
        return (values / self.scaling).astype(np.float32)

    def decode(self, latents: Floats) -> Floats:
        return self.decoder.run({"latent_sample": latents})["sample"]

    def encode(self, pixels: Floats) -> Floats:
        return self.encoder.run({"sample": pixels})["latent_parameters"]

    def tiled(self, latents: Floats, edges: str) -> Floats:
        tiling = Tiling(TILE * self.factor, edges=edges)
        return np.concatenate(list(decode_tiles(self.decode, latents, tiling, self.factor)), axis=2)


@pytest.fixture(scope="module", params=["sd1", "emoji"])
def vae(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Vae]:
    """Random weights, and trained ones."""
    if request.param == "emoji":
        path, source = request.getfixturevalue("emoji_bundle"), request.getfixturevalue("emoji_source")
    else:
        path, source = tiny.bundle(request.param), tiny.source(request.param)
    bundle, settings = Bundle.open(path), EngineSettings("onnxruntime")
    theirs = AutoencoderKL.from_pretrained(source / "vae").eval()
    latent = bundle.manifest.latent
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = TILE, TILE * latent.vae_scale_factor
    with make_engine(bundle, "vae_decoder", settings) as decoder, make_engine(bundle, "vae_encoder", settings) as coder:
        yield Vae(decoder, coder, theirs, latent.vae_scale_factor, latent.channels, latent.scaling)


def psnr(received: NDArray[Any], expected: NDArray[Any], peak: float) -> float:
    error = np.mean((received.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(peak**2 / max(error, 1e-20)))


def pixels(decoded: NDArray[Any]) -> NDArray[Any]:
    return np.rint(np.clip(decoded / 2 + 0.5, 0, 1) * 255)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_are_decoded_as_in_diffusers(vae: Vae, height: int, width: int) -> None:
    """With the same tiles, cut at the edges, pictures are those of tiled_decode."""
    latents = vae.latents(height, width)
    with torch.no_grad():
        expected = vae.theirs.decode(torch.from_numpy(latents)).sample.numpy()
    received = vae.tiled(latents, "cut")
    assert received.shape == expected.shape
    whole = vae.decode(latents)
    assert psnr(pixels(whole), pixels(expected), 255) < GATE, "tiles that made no difference would prove nothing"
    assert psnr(pixels(received), pixels(expected), 255) >= GATE


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_are_encoded_as_in_diffusers(vae: Vae, height: int, width: int) -> None:
    """With the same tiles, cut at the edges, mean and log variance are those of tiled_encode."""
    picture = np.clip(vae.decode(vae.latents(height, width)), -1, 1)
    with torch.no_grad():
        expected = vae.theirs.encode(torch.from_numpy(picture)).latent_dist.parameters.numpy()
    received = encode_tiles(vae.encode, picture, Tiling(TILE * vae.factor, edges="cut"), vae.factor)
    assert received.shape == expected.shape
    assert psnr(received, expected, float(np.ptp(expected))) >= GATE


def test_tiles_of_one_shape_are_nearer_to_the_whole(vae: Vae) -> None:
    """A last tile that is moved inwards has the others' shape, and errs less than one that is a sliver."""
    shapes = set()

    def decode(latents: Floats) -> Floats:
        shapes.add(latents.shape)
        return vae.decode(latents)

    errors: dict[str, list[float]] = {edges: [] for edges in EDGES}
    for height, width in SIZES[:3]:
        latents = vae.latents(height, width)
        whole = vae.decode(latents)
        shapes.clear()
        list(decode_tiles(decode, latents, Tiling(TILE * vae.factor), vae.factor))
        assert shapes == {(2, vae.channels, TILE, TILE)}
        for edges, found in errors.items():
            found.append(psnr(pixels(vae.tiled(latents, edges)), pixels(whole), 255))
    print({edges: [round(each, 1) for each in found] for edges, found in errors.items()})
    assert min(errors["shift"]) > min(errors["cut"])


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize(("height", "width", "size", "overlap"), [(45, 19, 8, 4), (8, 9, 8, 0), (64, 64, 24, 6)])
def test_what_is_local_is_not_changed_by_tiles(height: int, width: int, size: int, overlap: int, edges: str) -> None:
    """Tiles of a function of each place alone give what the function gives of the whole, whatever the geometry."""
    latents = np.random.default_rng(1).standard_normal((2, 3, height, width)).astype(np.float32)
    largest = 0

    def decode(tile: Floats) -> Floats:
        nonlocal largest
        largest = max(largest, *tile.shape[2:])
        return np.tanh(tile).repeat(4, axis=2).repeat(4, axis=3)

    tiling = Tiling(4 * size, 4 * overlap, edges)
    lines = list(decode_tiles(decode, latents, tiling, 4))
    np.testing.assert_allclose(np.concatenate(lines, axis=2), decode(latents), atol=1e-6)
    largest = 0
    list(decode_tiles(decode, latents, tiling, 4))
    assert largest == size
    assert max(part.shape[2] for part in lines) <= 4 * size, "no more than a row of tiles is kept"
    mean = np.tanh(latents).repeat(4, axis=2).repeat(4, axis=3)
    encoded = encode_tiles(lambda tile: tile[:, :, ::4, ::4], mean, tiling, 4)
    np.testing.assert_allclose(encoded, np.tanh(latents), atol=1e-6)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(12), r"the size of tiles is 12 pixels, expected a multiple of 4 from 32"),
        (Tiling(34), r"the size of tiles is 34 pixels"),
        (Tiling("64"), r"the size of tiles is '64' pixels"),  # type: ignore[arg-type]
        (Tiling(64, 36), r"the overlap of tiles is 36 pixels, expected a multiple of 4 from 0 to 32, half of"),
        (Tiling(64, -4), r"the overlap of tiles is -4 pixels"),
        (Tiling(64, edges="bent"), r"vae_tiling.edges is 'bent', expected shift or cut"),
    ],
)
def test_wrong_tiles_are_refused(tiling: Tiling, message: str) -> None:
    """Lengths that do not fit the latents are refused, with what would fit."""
    with pytest.raises(InvalidRequestError, match=message):
        tiling.fitted(4)


def test_a_decoder_of_another_scale_is_found() -> None:
    """A tile that comes out in another size than the manifest says is an error, not a skewed picture."""
    latents = np.zeros((1, 3, 20, 20), np.float32)
    with pytest.raises(EngineError, match="a tile came out as 8x8, expected 32x32"):
        list(decode_tiles(lambda tile: tile, latents, Tiling(32), 4))
    with pytest.raises(InvalidRequestError, match="the image is 20x18, expected multiples of 4"):
        encode_tiles(lambda tile: tile, np.zeros((1, 3, 18, 20), np.float32), Tiling(32), 4)


def test_a_request_in_tiles(tiny_bundles: dict[str, Path]) -> None:
    """Tiles concern decoding alone, are in the result's request, and leave pictures alone that are no larger."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as pipe:
        draw = functools.partial(pipe, "a red apple", steps=1, seed=7, width=64, height=48, images=2)
        whole, tiled, large = draw(), draw(vae_tiling=32), draw(vae_tiling=True)
        assert (whole.request.vae_tiling, tiled.request.vae_tiling) == (None, Tiling(32, 8))
        np.testing.assert_array_equal(tiled.latents, whole.latents)
        assert tiled.images.shape == whole.images.shape
        assert np.any(tiled.images != whole.images)
        np.testing.assert_array_equal(pipe.decode(whole.latents, Tiling(32, 8)), tiled.images)
        assert large.request.vae_tiling == Tiling(512, 128)
        np.testing.assert_array_equal(large.images, whole.images)
        assert draw(vae_tiling=False).request.vae_tiling is None
        with pytest.raises(InvalidRequestError, match="size of tiles is 33 pixels, expected a multiple of 2 from 16"):
            draw(vae_tiling=33)
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", fixed_size=(64, 48, 2)) as fixed:
        with pytest.raises(InvalidRequestError, match="decoder was loaded for 64x48 alone, and tiles of 32 are asked"):
            fixed("a red apple", steps=1, vae_tiling=32)
        assert fixed("a red apple", steps=1, vae_tiling=64).images.shape == (2, 48, 64, 3)
