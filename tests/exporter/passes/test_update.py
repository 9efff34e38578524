"""The fused step against guidance and a sampler's update in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.update import fuse_update, read_registers

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


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


def test_a_step_of_unknown_names_is_not_fused(parse: Parse, denoiser: str) -> None:
    """An input or output that the graph does not have is refused by name."""
    with pytest.raises(ValueError, match="no input 'sample' and output 'out'"):
        fuse_update(parse(denoiser), sample="sample", prediction="out")


def test_a_network_beside_the_denoiser_reads_the_registers(parse: Parse, run: Run) -> None:
    """Its latents are the scaled first register, and a graph without that input is refused by name."""
    graph = parse("control (float[batch, 2, h, w] sample) => (float[batch, 2, h, w] out) { out = Neg(sample) }")
    read_registers(graph, sample="sample")
    assert [value.name for value in graph.inputs] == ["registers", "input_scale"]
    registers = np.random.default_rng(0).standard_normal((2, 3, 2, 4, 6), np.float32)
    scale = np.array([0.5, 2.0], np.float32)
    result = run(graph, {"registers": registers, "input_scale": scale})["out"]
    np.testing.assert_array_equal(result, -registers[:, 0] * scale[:, None, None, None])
    with pytest.raises(ValueError, match="no input 'sample' of known type"):
        read_registers(graph, sample="sample")
