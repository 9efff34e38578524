"""Figures of images against scikit-image's, and the gate that they must pass."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentrt.engines.errors import VerificationError
from latentrt.exporter.precision.quality import EngineComparison, ImageQuality, picture_psnr, picture_ssim, require


def test_figures_of_pictures_are_those_of_scikit_image() -> None:
    """PSNR and SSIM agree with an independent implementation, at Wang's settings."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (24, 33, 3)).astype(np.uint8)
    for noise in (1, 12, 80):
        second = np.clip(first + rng.normal(0, noise, first.shape), 0, 255).astype(np.uint8)
        assert picture_psnr(first, second) == pytest.approx(peak_signal_noise_ratio(first, second))
        # scikit-image averages over the whole picture with mirrored borders, unless the window is told to stay inside.
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        _, local = structural_similarity(first, second, channel_axis=2, full=True, **options)
        assert picture_ssim(first, second) == pytest.approx(float(local[5:-5, 5:-5].mean()), abs=1e-6)
    assert (picture_psnr(first, first), picture_ssim(first, first)) == (100, pytest.approx(1))


def test_gate_says_what_was_measured_and_what_to_do() -> None:
    """Pictures below the gate of their precision, or that are no numbers, are refused."""
    require(ImageQuality(25.1, 20, 0.9), "int8", "onnxruntime")
    for psnr in (24.9, float("nan")):
        with pytest.raises(VerificationError, match=r"onnxruntime: images in int8 .* 25 dB .*--accept-quality"):
            require(ImageQuality(psnr, 20, 0.9), "int8", "onnxruntime")


def test_a_slower_precision_is_reported() -> None:
    """What takes longer than the next higher precision on this machine is said to."""
    assert "slower on this machine: a step takes 1.50 times as long as in fp32" in str(
        EngineComparison(ImageQuality(30, 29, 0.9, 1.5), False, "fp32")
    )
    assert "0.50 of the time that fp16 takes" in str(EngineComparison(ImageQuality(30, 29, 0.9, 0.5), False, "fp16"))
    assert "emulated" in str(EngineComparison(ImageQuality(30, 29, 0.9), True, "fp16"))
