"""An image prompt among the options of a request: read where the bundle has an IP-Adapter, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.inputs.image_prompt import take_image_prompt

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)


def test_a_picture_in_the_prompt_needs_an_adapter(tiny_bundles: dict[str, Path]) -> None:
    """A bundle without one says how to get it; a scale alone means nothing."""
    manifest = Bundle.open(tiny_bundles["sd1"]).manifest
    with pytest.raises(InvalidRequestError, match="--ip-adapter FILE --image-encoder DIR"):
        take_image_prompt({"ip_adapter_image": PICTURE}, manifest)
    with pytest.raises(InvalidRequestError, match="without ip_adapter_image"):
        create_request(manifest, "a", ip_adapter_scale=1.0)
