"""The split into stages, on graphs small enough to read and, with shared guidance, on exported U-Nets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.guidance import share_guidance
from latentrt.exporter.passes.stages import split_stages
from latentrt.runtime.bundle.reader import Bundle

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def split(graph: ir.Graph) -> tuple[ir.Graph, ir.Graph, ir.Graph]:
    stages = split_stages(graph, conditioning=["text"], time=["time"])
    assert stages.prompt is not None
    assert stages.schedule is not None
    return stages.prompt, stages.schedule, stages.step


def test_stages_hold_what_changes_at_their_rate(
    parse: Parse, run: Run, denoiser: str, denoiser_feeds: dict[str, NDArray[np.float32]]
) -> None:
    """Prompt and schedule stages hand their results to a step that computes what the whole graph computes."""
    graph = parse(denoiser)
    expected = run(graph, denoiser_feeds)["out"]
    prompt, schedule, step = split(graph)
    assert [value.name for value in prompt.outputs] == ["keys"]
    assert [value.name for value in schedule.outputs] == ["clock"]
    assert {value.name for value in step.inputs} == {"latents", "keys", "clock"}
    handed = run(prompt, denoiser_feeds) | run(schedule, denoiser_feeds)
    np.testing.assert_array_equal(run(step, {**denoiser_feeds, **handed})["out"], expected)
    np.testing.assert_array_equal(run(graph, denoiser_feeds)["out"], expected, err_msg="the graph itself has changed")


def test_what_expanding_makes_larger_is_not_hoisted(parse: Parse) -> None:
    """An Expand of a prompt's vector runs in the step: its input is smaller than its output."""
    graph = parse(
        """
        denoiser (float[batch, 64, 8] latents, float[batch, 1, 8] text) => (float[batch, 64, 8] out)
            <int64[3] shape = {1, 64, 8}>
        {
            vector = Tanh(text)
            wide = Expand(vector, shape)
            out = Add(latents, wide)
        }
        """
    )
    stages = split_stages(graph, conditioning=["text"], time=[])
    assert stages.prompt_tensors == ("vector",)
    assert stages.schedule is None


def test_an_unknown_input_is_named(parse: Parse, denoiser: str) -> None:
    """A rate for an input that does not exist is an error."""
    with pytest.raises(ValueError, match="no input 'txet'"):
        split_stages(parse(denoiser), conditioning=["txet"], time=["time"])


@pytest.mark.parametrize("kind", ["emoji", "sd1", "sd2"])
def test_a_staged_and_shared_unet_computes_what_the_export_computes(
    kind: str, emoji_bundle: Path, tiny_bundles: dict[str, Path], run: Run
) -> None:
    """On exported U-Nets: K and V of each cross-attention on the frontier, and the same result to 1e-5."""
    bundle = Bundle.open({"emoji": emoji_bundle, **tiny_bundles}[kind])
    plain = ir.external_data.load_to_model(ir.load(bundle.graph_path("unet", "opset20-fp32"))).graph
    channels, width = int(plain.inputs[0].shape[1]), int(plain.inputs[2].shape[2])  # type: ignore[index, arg-type]
    stages = split_stages(plain, conditioning=["encoder_hidden_states"], time=["timestep"])
    attentions = {"emoji": 7, "sd1": 4, "sd2": 4}[kind]
    residual_blocks = {"emoji": 11, "sd1": 8, "sd2": 8}[kind]
    assert len(stages.prompt_tensors) == 2 * attentions
    assert len(stages.schedule_tensors) == residual_blocks
    assert stages.prompt is not None
    assert stages.schedule is not None
    assert share_guidance(stages.step, conditioned=stages.prompt_tensors) > 10
    generator = np.random.default_rng(0)
    for batch, height, length in ((1, 16, 16), (3, 10, 24)):
        latents = generator.standard_normal((batch, channels, height, length), dtype=np.float32)
        states = generator.standard_normal((2 * batch, 77, width), dtype=np.float32)
        whole = {
            "sample": np.concatenate([latents, latents]),
            "timestep": np.full(2 * batch, 501, np.float32),
            "encoder_hidden_states": states,
        }
        expected = run(plain, whole)["out_sample"]
        table = run(stages.schedule, {"timestep": np.array([999, 501, 1], np.float32)})
        row = {name: np.repeat(values[1:2], batch, axis=0) for name, values in table.items()}
        rows = np.tile(np.arange(batch), 2)
        feeds = {"sample": latents, "rows": rows, **row, **run(stages.prompt, {"encoder_hidden_states": states})}
        result = run(stages.step, feeds)["out_sample"]
        assert result.shape == expected.shape
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)  # type: ignore[operator]
        assert error <= 1e-5
