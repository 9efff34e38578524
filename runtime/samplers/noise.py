"""Gaussian noise that equals PyTorch's, without PyTorch: same seed, same image.

Reproduces ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` in float32, draw after draw.

Sources (PyTorch 2.13, unchanged in substance since 1.x):

- ``aten/src/ATen/core/MT19937RNGEngine.h``: MT19937 (Matsumoto and Nishimura, ACM TOMACS 8(1), 1998), seeded by
  Knuth's recurrence from the low 32 bits of the 64-bit seed; numpy's legacy seeding is the same recurrence.
- ``aten/src/ATen/CPUGeneratorImpl.cpp``: a 64-bit word is two 32-bit words, high half first; the generator, not
  the call, keeps the unused half of a scalar Box-Muller pair.
- ``aten/src/ATen/core/TransformationHelper.h``: a uniform is the low 24 (float) or 53 (double) bits of a word,
  scaled into [0, 1).
- ``aten/src/ATen/native/cpu/DistributionTemplates.h``: tensors of 16 or more elements take the block path, smaller
  ones the scalar path; ``aten/src/ATen/core/DistributionsHelper.h``: the scalar path.
- Box and Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29(2), 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import check_integer

MAX_SEED = 2**64 - 1
"""Largest seed; seeds that differ only above bit 31 give the same noise, here as in PyTorch."""
BLOCK = 16
"""Length of a Box-Muller block, and the shortest draw that takes the block path."""

_HALF = BLOCK // 2
# PyTorch's AVX2 kernel multiplies by 2 pi rounded to float32, in float32. The product's rounding is worth up to
# 2e-6 in the result, so it has to be repeated here; everything after it is computed in float64 and rounded once.
_TWO_PI = np.float32(2.0 * math.pi)


class Noise(Protocol):
    """A stream of standard normal deviates; :class:`TorchGenerator` is one."""

    def randn(self, shape: Sequence[SupportsIndex]) -> NDArray[np.float32]:
        """The next deviates of the stream, float32 of that shape."""
        ...


class TorchGenerator:
    """The normal deviates of ``torch.Generator("cpu")``; consecutive draws continue one stream.

    The 32-bit words are PyTorch's exactly. The deviates agree to 5e-7 with PyTorch's on x86 (its AVX2
    kernel, which AVX-512 machines run too), and to 3e-6 with its builds for other processors, which round the
    angle differently and so differ from x86 by as much.

    Not for use from several threads at once: make one per request.

    Args:
        seed: 0 to 2**64 - 1.

    Raises:
        InvalidRequestError: if the seed is no integer or out of range.
    """

    def __init__(self, seed: SupportsIndex) -> None:
        number = check_integer("seed", seed, 0, MAX_SEED)
        # numpy's documented way to MT19937 under Knuth's seeding rather than by an array; NEP 19 froze its stream.
        self._engine = np.random.RandomState(number & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Sequence[SupportsIndex]) -> NDArray[np.float32]:
        """Draw standard normal deviates, as ``torch.randn(shape, generator=generator)`` does.

        Args:
            shape: Lengths of the result's dimensions; a length may be 0, and ``()`` draws one number.

        Returns:
            float32 array of that shape, filled in row-major order.

        Raises:
            InvalidRequestError: if a length is no integer or negative.
        """
        lengths = tuple(check_integer("a length of shape", length, 0) for length in shape)
        count = math.prod(lengths)
        flat = self._block_path(count) if count >= BLOCK else self._scalar_path(count)
        return flat.reshape(lengths)

    def _block_path(self, count: int) -> NDArray[np.float32]:
        """``count`` >= 16 deviates; the scalar path's spare is neither used nor dropped."""
        values = self._uniforms(count)
        whole = count - count % BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != count:
            # Where blocks do not fit, the last 16 values are drawn anew, over part of the last whole block.
            values[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return values

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _scalar_path(self, count: int) -> NDArray[np.float32]:
        """``count`` < 16 deviates, one pair at a time in double precision; half a pair waits for the next draw."""
        values: list[float] = []
        while len(values) < count:
            if self._spare is not None:
                values.append(self._spare)
                self._spare = None
                continue
            first, second = self._double(), self._double()
            radius = math.sqrt(-2.0 * math.log1p(-second))
            values.append(radius * math.cos(2.0 * math.pi * first))
            self._spare = radius * math.sin(2.0 * math.pi * first)
        return np.array(values, np.float32)

    def _double(self) -> float:
        high, low = self._words(2).tolist()
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _words(self, count: int) -> NDArray[np.uint32]:
        # Over the full range, each integer is one word of the engine as it comes.
        return self._engine.randint(0, 2**32, size=count, dtype=np.uint32)


class SharedNoise:
    """One stream of noise for several: each draw is made for all of them at once, and every member gets its part.

    So noise is that of diffusers for one generator and several prompts. The members draw equally often, and no
    shape but the first dimension differs between them. Not for use from several threads at once.

    Args:
        noise: The stream.
        counts: Length of the first dimension for each member.
    """

    def __init__(self, noise: Noise, counts: Sequence[int]) -> None:
        self._noise, self._counts = noise, tuple(counts)
        self._draws: list[NDArray[np.float32]] = []
        self._taken = [0] * len(counts)

    def members(self) -> list[Noise]:
        """The stream of each."""
        return [_Member(self, number) for number in range(len(self._counts))]

    def take(self, number: int, shape: Sequence[SupportsIndex]) -> NDArray[np.float32]:
        """The part of a member in its next draw; ``shape`` begins with its own count."""
        if self._taken[number] == len(self._draws):
            self._draws.append(self._noise.randn((sum(self._counts), *shape[1:])))
        first = sum(self._counts[:number])
        part = self._draws[self._taken[number]][first : first + self._counts[number]]
        self._taken[number] += 1
        while self._draws and all(self._taken):  # everyone has the oldest
            self._draws.pop(0)
            self._taken = [taken - 1 for taken in self._taken]
        return part


@dataclass(frozen=True)
class _Member:
    shared: SharedNoise
    number: int

    def randn(self, shape: Sequence[SupportsIndex]) -> NDArray[np.float32]:
        return self.shared.take(self.number, shape)


def torch_randn(seed: SupportsIndex, shape: Sequence[SupportsIndex]) -> NDArray[np.float32]:
    """The first draw of a fresh generator: ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))``.

    Args:
        seed: 0 to 2**64 - 1.
        shape: Lengths of the result's dimensions.

    Returns:
        float32 array of that shape; see :class:`TorchGenerator` for how closely it agrees.

    Raises:
        InvalidRequestError: if the seed or the shape is none.
    """
    return TorchGenerator(seed).randn(shape)


def varied_noise(
    stream: Noise, shape: Sequence[SupportsIndex], seed: int | None, strength: float | None
) -> NDArray[np.float32]:
    """A draw from a stream, turned a part of the way towards the first draw of another seed.

    The way is a great circle's (Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, for vectors of
    many dimensions): a straight line between two draws would lead through noise that is too weak.

    Args:
        stream: Where noise comes from.
        shape: Shape of the noise; the first dimension is that of images, each of which turns by an angle of its own.
        seed: The other seed.
        strength: 0 to 1; ``None`` is 0.

    Returns:
        float32 array of that shape.
    """
    noise = stream.randn(shape)
    if not strength:
        return noise
    first, second = (each.reshape(len(each), -1).astype(np.float64) for each in (noise, torch_randn(seed or 0, shape)))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    angle = np.arccos(np.clip((first * second).sum(axis=1) / lengths, -1, 1))[:, None]
    apart = np.sin(angle) > 1e-6  # or they are one direction, and any way between them is the same
    whole = np.where(apart, np.sin(angle), 1.0)
    shares = [np.where(apart, np.sin(part * angle) / whole, part) for part in (1 - strength, strength)]
    return np.asarray(shares[0] * first + shares[1] * second, np.float32).reshape(noise.shape)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform whole blocks of 16 uniforms; in each, the first 8 give the radii and the last 8 the angles."""
    blocks = uniforms.reshape(-1, 2, _HALF)
    # 1 - u lies in (0, 1], where the logarithm is finite.
    radius = np.sqrt(-2.0 * np.log((np.float32(1.0) - blocks[:, 0]).astype(np.float64)))
    angle = (_TWO_PI * blocks[:, 1]).astype(np.float64)
    result = np.empty_like(blocks)
    result[:, 0] = radius * np.cos(angle)
    result[:, 1] = radius * np.sin(angle)
    return result.reshape(-1)
