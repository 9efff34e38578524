"""The encoding of an image prompt, and a bundle with an IP-Adapter that gets none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Pipeline

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)


OPTIONS: dict[str, Any] = {"width": 48, "height": 24, "steps": 3, "seed": 7, "sampler": "euler", "guidance": 4.0}


@pytest.mark.heavy
def test_without_a_picture_an_adapter_changes_nothing(tiny: Any) -> None:
    """Pictures are bit for bit those of a scale of 0, and near those of a bundle without; scales are checked."""
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime") as pipe:
        plain = pipe("a red apple", **OPTIONS).latents
        none = pipe("a red apple", **OPTIONS, ip_adapter_image=PICTURE, ip_adapter_scale=0)
        np.testing.assert_array_equal(none.latents, plain)
        assert none.request.ip_adapter_image is not None
        assert none.request.ip_adapter_scale == 0
        with pytest.raises(InvalidRequestError, match="ip_adapter_scale is -1"):
            pipe("a red apple", **OPTIONS, ip_adapter_image=PICTURE, ip_adapter_scale=-1)
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        np.testing.assert_allclose(pipe("a red apple", **OPTIONS).latents, plain, atol=1e-4)
