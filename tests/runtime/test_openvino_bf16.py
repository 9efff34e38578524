"""OpenVINO in bf16, on processors that have it: what is rounded, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.openvino import engine as ov
from latentrt.exporter.precision.quality import GATES, picture_psnr
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.engine_choice import EngineSettings, make_engine

pytestmark = pytest.mark.skipif(not ov.has_bf16(ov.load_core()), reason="this processor has no bf16")


def test_the_samplers_state_keeps_its_bits(tiny_bundle: Path) -> None:
    """An update that adds nothing gives back every register as it was, though the model is computed in bf16."""
    random = np.random.default_rng(0)
    lengths = {"batch": 1, "rows": 2, "registers": 2, "terms": 4, "latent_height": 4, "latent_width": 4}
    with make_engine(Bundle.open(tiny_bundle), "unet_step", EngineSettings("openvino", "bf16")) as engine:
        feeds = {
            name: random.standard_normal(
                [lengths.get(str(n), n if isinstance(n, int) else 77) for n in spec.shape]
            ).astype(np.float32)
            for name, spec in engine.inputs.items()
        }
        rows = {"rows": [0, 0], "unconditional": [0], "conditional": [1]}
        feeds |= {name: np.array(places, np.int64) for name, places in rows.items()}
        feeds["update"] = np.eye(2, 4, dtype=np.float32)[None]
        np.testing.assert_array_equal(engine.run(feeds)["updated_registers"], feeds["registers"])
        feeds["update"] = np.eye(2, 4, k=2, dtype=np.float32)[None]  # the prediction, and noise
        updated = engine.run(feeds)["updated_registers"]
    np.testing.assert_array_equal(updated[:, 1], feeds["noise"])
    assert np.abs(updated[:, 0]).max() > 0


def test_pictures_are_close_to_those_of_fp32(tiny_bundle: Path) -> None:
    """They pass the gate that a build holds them to."""
    pictures = []
    for precision in ("fp32", "bf16"):
        with Pipeline.load(tiny_bundle, "openvino", precision=precision) as pipe:
            pictures.append(pipe("a red apple", steps=4, seed=7).images[0])
    assert GATES["bf16"] <= picture_psnr(*pictures) < 100
