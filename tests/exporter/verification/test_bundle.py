"""A bundle is compared with the source that it should come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.engines.errors import (
    BundleError,
    VerificationError,
)
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.bundle import verify_bundle
from latentrt.runtime.bundle.reader import Bundle

ChangeWeights = Callable[[Path], None]


@pytest.mark.heavy
def test_verify_bundle(
    tiny_source: Path, tiny_bundle: Path, change_weights: ChangeWeights, graph_files: tuple[str, ...]
) -> None:
    """A bundle passes against its own source, and is refused against another or with a graph of another model."""
    figures = verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))
    assert figures.keys() == set(graph_files)
    weights = tiny_bundle / "text_encoder" / "model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(VerificationError, match="text_encoder"):
        verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))
    change_weights(tiny_source)
    with pytest.raises(BundleError, match="was not built from"):
        verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))
