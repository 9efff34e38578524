"""Noise is that of PyTorch's generator, which is the oracle, bit for bit."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.samplers.noise import TorchGenerator, torch_randn

# PyTorch rounds the Box-Muller angle differently where it has no AVX2 kernel (see TorchGenerator).
TOLERANCE = 1e-6 if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"} else 3e-6


def reference(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", range(41))
def test_every_small_size_equals_torch(size: int) -> None:
    """Draws of 0 to 40 numbers cover both paths, whole blocks and every length of tail."""
    for seed in (0, 7, 2**31 + 5):
        assert_same(torch_randn(seed, (size,)), torch.randn(size, generator=reference(seed)))


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_equal_torch(seed: int) -> None:
    """Any seed that torch takes as an unsigned number gives torch's noise."""
    assert_same(torch_randn(seed, (2, 4, 8, 8)), torch.randn(2, 4, 8, 8, generator=reference(seed)))
    assert_same(torch_randn(seed, (5,)), torch.randn(5, generator=reference(seed)))


def test_a_thousand_random_shapes_equal_torch() -> None:
    """Shapes of one to five dimensions under seeds of 64 bits equal torch."""
    rng = random.Random(2)
    for _ in range(1000):
        shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 5)))
        seed = rng.getrandbits(64)
        assert_same(torch_randn(seed, shape), torch.randn(shape, generator=reference(seed)))


def test_consecutive_draws_continue_the_stream() -> None:
    """Small and large draws mixed from one generator equal torch, the spare half of a scalar pair included."""
    rng = random.Random(3)
    for seed in (7, 2**64 - 1):
        ours, theirs = TorchGenerator(seed), reference(seed)
        for _ in range(400):
            size = rng.choice([0, 1, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 40, 700, 2496])
            assert_same(ours.randn((size,)), torch.randn(size, generator=theirs))


def test_a_long_draw_equals_torch_to_the_last_number() -> None:
    """A million deviates, which pass the generator's state many times over, stay within the tolerance."""
    assert_same(torch_randn(42, (1_000_003,)), torch.randn(1_000_003, generator=reference(42)))


def test_extreme_uniforms_stay_finite() -> None:
    """The largest deviate that a 24-bit uniform can give is sqrt(48 ln 2), and no draw exceeds it."""
    drawn = torch_randn(1, (4, 512, 512))
    assert np.isfinite(drawn).all()
    assert np.abs(drawn).max() <= math.sqrt(48 * math.log(2))


def test_scalar_shape_draws_one_number() -> None:
    """An empty shape gives an array of no dimensions, as in torch."""
    assert_same(torch_randn(9, ()), torch.randn((), generator=reference(9)))


def test_an_empty_draw_leaves_the_stream_alone() -> None:
    """A shape with a length of 0 consumes nothing."""
    generator = TorchGenerator(5)
    assert generator.randn((3, 0, 4)).shape == (3, 0, 4)
    np.testing.assert_array_equal(generator.randn((20,)), torch_randn(5, (20,)))


def test_numpy_integers_serve_as_seed_and_shape() -> None:
    """Seeds and lengths taken from arrays work like plain integers."""
    np.testing.assert_array_equal(torch_randn(np.uint64(2**64 - 1), (np.int64(18),)), torch_randn(2**64 - 1, (18,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30, 7.0, "7", None])
def test_seeds_outside_64_bits_are_refused(seed: object) -> None:
    """A negative, too large or non-integer seed is an InvalidRequestError that names it."""
    with pytest.raises(InvalidRequestError, match="seed"):
        TorchGenerator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, -1), (2.5,), ("3",)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """A negative or non-integer length is an InvalidRequestError."""
    with pytest.raises(InvalidRequestError, match="shape"):
        torch_randn(0, shape)
