"""Images as part of the prompt, for bundles that were built with an IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import IMAGE_ENCODER, Manifest
from ..images.reading import read_picture


def take_image_prompt(
    options: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    """Read the ``ip_adapter_image`` of a request's options.

    Args:
        options: With or without it, see :func:`~latentrt.runtime.images.reading.read_picture`.
        manifest: The bundle's.

    Returns:
        The options with a record in the place of the image, and the image, uint8 ``[h, w, 3]``; ``None`` if there is
        none.

    Raises:
        InvalidRequestError: if it cannot be read, or the bundle has no IP-Adapter.
    """
    rest = {name: value for name, value in options.items() if name != "ip_adapter_image"}
    given = options.get("ip_adapter_image")
    if given is None:
        return rest, None
    if IMAGE_ENCODER not in manifest.components:
        raise InvalidRequestError(
            "ip_adapter_image is given, but the bundle has no IP-Adapter; build it again with --ip-adapter FILE "
            "--image-encoder DIR"
        )
    image = read_picture(given, "ip_adapter_image")
    return {**rest, "ip_adapter_image": image.record}, image.pixels
