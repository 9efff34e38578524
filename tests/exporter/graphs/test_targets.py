"""The table of forms that engines take."""

from __future__ import annotations

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.kinds import KINDS
from latentrt.exporter.graphs.targets import PORTABLE, exported_form, form_for, next_higher


def test_every_precision_of_every_engine_has_a_form() -> None:
    """Each is exported as itself or quantised from a form that is, and has a higher precision to be compared with."""
    for engine, kind in KINDS.items():
        for precision in kind.precisions:
            form = form_for(engine, precision)
            base = exported_form(form)
            assert form.opset == base.opset == kind.form.opset
            assert base.precision in ("fp32", "fp16", "bf16")
            assert form.quantized == (base != form)
            assert next_higher(engine, precision) in kind.precisions
    assert form_for("openvino", "bf16") == PORTABLE  # it rounds by itself
    with pytest.raises(InvalidRequestError, match=r"onnxruntime does not compute in fp8; choose .*tensorrt"):
        form_for("onnxruntime", "fp8")
