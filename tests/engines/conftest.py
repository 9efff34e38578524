"""What tests of ONNX Runtime's providers for GPUs share."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

_STEP = """
<ir_version: 10, opset_import: ["" : 20]>
step (float[batch, 3] x, float[3, 2] w, int64[batch] rows) => (float[batch, 2] y, int64[batch] same) {
    product = MatMul(x, w)
    y = Tanh(product)
    same = Identity(rows)
}
"""


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """File of a graph that computes ``y = tanh(x @ w)``, and passes ``rows`` through as ``same``."""
    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet" / "model.onnx"
    onnx.save(onnx.parser.parse_model(_STEP), path)
    return path
