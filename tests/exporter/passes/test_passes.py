"""Stages and guidance sharing, on graphs small enough to read and on exported U-Nets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.dependencies import dependencies
from latentrt.exporter.passes.guidance import share_guidance
from latentrt.exporter.passes.lengths import measure_elsewhere
from latentrt.exporter.passes.reshapes import reshape_by_own_lengths
from latentrt.exporter.passes.stages import split_stages
from latentrt.exporter.passes.update import fuse_update
from latentrt.runtime.bundle.reader import Bundle

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]

DENOISER = """
denoiser (float[batch, 4] latents, float[batch] time, float[batch, 3] text) => (float[batch, 4] out)
    <float[3, 4] key = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[1] last = {1}, float[1] tenth = {0.1}>
{
    projected = MatMul(text, key)
    keys = Tanh(projected)
    column = Unsqueeze(time, last)
    scaled = Mul(column, tenth)
    clock = Sin(scaled)
    first = Mul(latents, tenth)
    second = Add(first, clock)
    third = Sigmoid(second)
    out = Mul(third, keys)
}
"""
FEEDS = {
    "latents": np.arange(8, dtype=np.float32).reshape(2, 4),
    "time": np.array([3.0, 4.0], np.float32),
    "text": np.arange(6, dtype=np.float32).reshape(2, 3) / 50,
}


def split(graph: ir.Graph) -> tuple[ir.Graph, ir.Graph, ir.Graph]:
    stages = split_stages(graph, conditioning=["text"], time=["time"])
    assert stages.prompt is not None
    assert stages.schedule is not None
    return stages.prompt, stages.schedule, stages.step


def test_dependencies_follow_inputs_through_nodes(parse: Parse) -> None:
    """A value depends on every graph input that reaches it, and a constant on none."""
    found = {value.name: set(names) for value, names in dependencies(parse(DENOISER)).items()}
    assert found["keys"] == {"text"}
    assert found["clock"] == {"time"}
    assert found["third"] == {"latents", "time"}
    assert found["out"] == {"latents", "time", "text"}


def test_dependencies_see_what_a_subgraph_captures(parse: Parse) -> None:
    """An If depends on what its branches take from outside."""
    graph = parse(
        """
        branching (bool which, float[2] a, float[2] b) => (float[2] out) {
            out = If (which) <
                then_branch = yes () => (float[2] y) { y = Identity(a) },
                else_branch = no () => (float[2] n) { n = Neg(b) }
            >
        }
        """
    )
    found = {value.name: set(names) for value, names in dependencies(graph).items()}
    assert found["out"] == {"which", "a", "b"}


def test_stages_hold_what_changes_at_their_rate(parse: Parse, run: Run) -> None:
    """Prompt and schedule stages hand their results to a step that computes what the whole graph computes."""
    graph = parse(DENOISER)
    expected = run(graph, FEEDS)["out"]
    prompt, schedule, step = split(graph)
    assert [value.name for value in prompt.outputs] == ["keys"]
    assert [value.name for value in schedule.outputs] == ["clock"]
    assert {value.name for value in step.inputs} == {"latents", "keys", "clock"}
    handed = run(prompt, FEEDS) | run(schedule, FEEDS)
    np.testing.assert_array_equal(run(step, {**FEEDS, **handed})["out"], expected)
    np.testing.assert_array_equal(run(graph, FEEDS)["out"], expected, err_msg="the graph itself has changed")


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


def test_an_unknown_input_is_named(parse: Parse) -> None:
    """A rate for an input that does not exist is an error."""
    with pytest.raises(ValueError, match="no input 'txet'"):
        split_stages(parse(DENOISER), conditioning=["txet"], time=["time"])


def test_guidance_shares_what_the_prompt_does_not_reach(parse: Parse, run: Run) -> None:
    """With two rows of text to a sample, latents and time keep one row, and both halves come out."""
    graph = parse(DENOISER)
    both = {name: np.concatenate([FEEDS[name], FEEDS[name]]) for name in ("latents", "time")}
    text = np.arange(12, dtype=np.float32).reshape(4, 3) / 50
    expected = run(graph, {**both, "text": text})["out"]
    assert share_guidance(graph, conditioned=["text"]) == 6
    for rows in ([0, 1, 0, 1], [0, 1], [1, 0, 0]):
        picked = [2 * rows[:place].count(row) + row for place, row in enumerate(rows)]
        feeds = {**FEEDS, "text": text[picked], "rows": np.array(rows)}
        np.testing.assert_allclose(run(graph, feeds)["out"], expected[picked], rtol=1e-6)


def test_a_shape_that_crosses_is_computed_again(parse: Parse, run: Run) -> None:
    """A shape taken from the latents, batch included, is that of the repeated latents where the prompt is."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, float[batch, 4] text) => (float[batch, 2, 2] out)
            <int64[2] square = {2, 2}>
        {
            count = Shape<start = 0, end = 1>(latents)
            shape = Concat<axis = 0>(count, square)
            joined = Add(latents, text)
            out = Reshape(joined, shape)
        }
        """
    )
    latents, text = FEEDS["latents"], np.arange(16, dtype=np.float32).reshape(4, 4)
    expected = run(graph, {"latents": np.concatenate([latents, latents]), "text": text})["out"]
    share_guidance(graph, conditioned=["text"])
    feeds = {"latents": latents, "text": text, "rows": np.array([0, 1, 0, 1])}
    np.testing.assert_array_equal(run(graph, feeds)["out"], expected)


def test_a_length_that_crosses_needs_no_values(parse: Parse, run: Run) -> None:
    """The picture's own size, and the number of rows, are known without gathering what they are measured on."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, float[batch, 2, 2] text) => (float[batch, 2, 2] out)
            <int64[1] two = {2}, float[1] half = {0.5}>
        {
            wide = Mul(latents, half)
            count = Shape<start = 0, end = 1>(wide)
            width = Shape<start = 1, end = 2>(wide)
            side = Div(width, two)
            shape = Concat<axis = 0>(count, side, two)
            added = Add(text, half)
            out = Reshape(added, shape)
        }
        """
    )
    share_guidance(graph, conditioned=["text"])
    assert [node.op_type for node in graph].count("Gather") == 0
    text = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
    feeds = {"latents": FEEDS["latents"], "text": text, "rows": np.array([0, 1, 0, 1])}
    np.testing.assert_array_equal(run(graph, feeds)["out"], text + 0.5)


def test_what_a_branch_captures_does_not_cross(parse: Parse) -> None:
    """A branch that would see values with other rows than it was made for is refused by name."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, bool text) => (float[batch, 4] out) {
            seen = Neg(latents)
            out = If (text) <
                then_branch = yes () => (float[batch, 4] y) { y = Identity(seen) },
                else_branch = no () => (float[batch, 4] n) { n = Neg(seen) }
            >
        }
        """
    )
    with pytest.raises(ValueError, match="uses 'seen' from outside"):
        share_guidance(graph, conditioned=["text"])


def test_a_name_that_is_taken_is_refused(parse: Parse) -> None:
    """A graph whose own input is called rows is left alone."""
    graph = parse("denoiser (float[batch] rows, float[batch] text) => (float[batch] out) { out = Add(rows, text) }")
    with pytest.raises(ValueError, match="an input 'rows' already"):
        share_guidance(graph, conditioned=["text"])


def test_latents_that_meet_the_prompt_at_once_are_gathered(parse: Parse, run: Run) -> None:
    """Where every node depends on the prompt nothing is shared, and the input itself crosses."""
    graph = parse(
        "denoiser (float[batch, 4] latents, float[batch, 4] text) => (float[batch, 4] out) { out = Add(latents, text) }"
    )
    assert share_guidance(graph, conditioned=["text"]) == 0
    text = np.zeros((3, 4), np.float32)
    rows = np.array([1, 0, 0])
    result = run(graph, {"latents": FEEDS["latents"], "text": text, "rows": rows})["out"]
    np.testing.assert_array_equal(result, FEEDS["latents"][rows])


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_fused_step_is_guidance_and_the_plans_update(parse: Parse, run: Run, dtype: str, rescale: float) -> None:
    """One call does what the loop in numpy does, for samples of different samplers, guided and not."""
    graph = parse(
        f"denoiser ({dtype}[batch, 2, h, w] latents, {dtype}[rows, 2, 1, 1] text) => ({dtype}[rows, 2, h, w] out)"
        f" <int64[3] rows_of = {{0, 1, 0}}> {{ seen = Gather<axis = 0>(latents, rows_of) out = Mul(seen, text) }}"
    )
    fuse_update(graph, sample="latents", prediction="out")
    generator = np.random.default_rng(0)
    registers = generator.standard_normal((2, 3, 2, 4, 6), np.float32)
    noise = generator.standard_normal((2, 2, 4, 6), np.float32)
    update = generator.standard_normal((2, 3, 5), np.float32)
    text = generator.standard_normal((3, 2, 1, 1), np.float32)
    feeds = {
        "registers": registers,
        "noise": noise,
        "update": update,
        "input_scale": np.array([0.5, 2.0], np.float32),
        "guidance": np.array([4.0, 1.0], np.float32),
        "guidance_rescale": np.array([rescale, 0.0], np.float32),
        "unconditional": np.array([0, 1]),
        "conditional": np.array([2, 1]),
        "text": text.astype("float32" if dtype == "float" else "float16"),
    }
    result = run(graph, feeds)["updated_registers"]
    for sample, (unconditional, conditional) in enumerate([(0, 2), (1, 1)]):
        latent = registers[sample, 0] * feeds["input_scale"][sample]
        low, high = latent * text[unconditional], latent * text[conditional]
        guided = low + feeds["guidance"][sample] * (high - low)
        share = feeds["guidance_rescale"][sample]
        guided = guided * (share * high.std() / guided.std() + 1 - share)
        terms = np.concatenate([registers[sample], guided[None], noise[sample][None]])
        expected = np.einsum("rt,tchw->rchw", update[sample], terms)
        np.testing.assert_allclose(result[sample], expected, atol=2e-2 if dtype == "float16" else 1e-5)


def test_the_update_is_no_product_of_matrices(parse: Parse) -> None:
    """Engines that compute products in less than fp32 leave the sampler's state alone."""
    graph = parse("denoiser (float[batch, 2, h, w] latents) => (float[rows, 2, h, w] out) { out = Identity(latents) }")
    fuse_update(graph, sample="latents", prediction="out")
    assert {node.op_type for node in graph}.isdisjoint({"MatMul", "Gemm", "Einsum", "Conv"})


def test_a_step_of_unknown_names_is_not_fused(parse: Parse) -> None:
    """An input or output that the graph does not have is refused by name."""
    with pytest.raises(ValueError, match="no input 'sample' and output 'out'"):
        fuse_update(parse(DENOISER), sample="sample", prediction="out")


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


MEASURED = """
step (float[batch, length, 3] text, float[batch, 2, length] keys, float[length] other) => (int64[1] out, {output})
{{
    length = Shape<start = 1, end = 2>(text)
    rows = Shape<start = {start}, end = 1>(text)
    sum = ReduceSum<keepdims = 0>(keys)
    whole = Cast<to = 7>(sum)
    out = Add(length, rows)
    {more}
}}
"""


def test_a_length_is_measured_on_what_is_there_anyway(parse: Parse, run: Run) -> None:
    """An input that is only measured goes where another has its lengths, and what is computed stays the same."""
    graph = parse(MEASURED.format(start=0, output="int64 whole", more=""))
    assert measure_elsewhere(graph, among=["keys"]) == ["text"]
    assert [value.name for value in graph.inputs] == ["keys", "other"]
    feeds = {"keys": np.zeros((5, 2, 7), np.float32), "other": np.zeros(7, np.float32)}
    assert run(graph, feeds)["out"] == [12]


@pytest.mark.parametrize(
    ("start", "output", "more", "among"),
    [
        (0, "int64 whole", "", []),
        (0, "int64 whole, float[batch, length, 3] copy", "copy = Identity(text)", ["keys"]),
        (-3, "int64 whole, int64[2] pair", "pair = Shape<end = 2>(text)", ["keys"]),
        (0, "int64 whole, int64[1] width", "width = Shape<start = 2>(text)", ["keys"]),
    ],
    ids=["nowhere else", "used", "two at once", "a number"],
)
def test_an_input_that_is_needed_stays(parse: Parse, start: int, output: str, more: str, among: list[str]) -> None:
    """Without another of its lengths, or with another use, nothing changes."""
    graph = parse(MEASURED.format(start=start, output=output, more=more))
    before = [(node.op_type, [str(value and value.name) for value in node.inputs]) for node in graph]
    assert measure_elsewhere(graph, among=among) == []
    assert [(node.op_type, [str(value and value.name) for value in node.inputs]) for node in graph] == before


VIEWS = """
views (float[batch, 3, h] sample, float[batch, length, 6] text) => (float[batch, length, 2, 3] out, float[p, q] whole)
    <int64[1] two = {2}, int64[1] three = {3}, int64[1] rest = {-1}, int64[2] flat = {-1, 6}>
{
    rows = Shape<start=0, end=1>(sample)
    tokens = Shape<start=1, end=2>(text)
    heads = Concat<axis=0>(rows, tokens, two, three)
    out = Reshape<allowzero=1>(text, heads)
    both = Mul(rows, tokens)
    lengths = Concat<axis=0>(both, rest)
    whole = Reshape(text, lengths)
}
"""


def test_a_text_is_reshaped_by_its_own_lengths(parse: Parse, run: Run) -> None:
    """A view whose rows were measured on the latents depends on the text alone; one that cannot be told so stays."""
    graph = parse(VIEWS)
    named = {value.name: value for node in graph for value in node.outputs}
    named["out"].shape = ir.Shape([ir.SymbolicDim("batch"), ir.SymbolicDim("length"), 2, 3])  # as the tracer says it
    feeds = {"sample": np.zeros((2, 3, 5), np.float32), "text": np.arange(48, dtype=np.float32).reshape(2, 4, 6)}
    before = run(parse(VIEWS), feeds)
    assert reshape_by_own_lengths(graph) == 1
    assert dependencies(graph)[named["out"]] == {"text"}
    assert dependencies(graph)[named["whole"]] == {"sample", "text"}
    for name, values in run(graph, feeds).items():
        np.testing.assert_array_equal(values, before[name])
