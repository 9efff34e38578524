"""Counting with ``operators`` and ``graph_shapes``, against torch's counter, numpy's, and the definitions in ONNX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from latentrt.benchmarks.roofline.counting import Work, bundle_work, count, count_model
from latentrt.engines import Engine
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.exporter.passes.quantize import FORMATS, find_layers, quantize
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.pipeline import Pipeline

FORM = "opset20-fp32"
FLOAT = TensorProto.FLOAT


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    weights: Mapping[str, Any] | None = None,
    opset: int = 23,
    dtype: int = FLOAT,
) -> ModelProto:
    """A model of ``nodes``; the outputs' shapes are left open."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def count_node(operator: str, *shapes: Sequence[int], opset: int = 23, dtype: int = FLOAT, **attributes: Any) -> Work:
    """Work of one node on inputs of these shapes; ``()`` leaves an optional input out."""
    inputs = {f"x{number}": shape for number, shape in enumerate(shapes) if shape}
    names = [f"x{number}" if shape else "" for number, shape in enumerate(shapes)]
    node = helper.make_node(operator, names, ["y"], **attributes)
    return count_model(make_model([node], inputs, ["y"], opset=opset, dtype=dtype), inputs)


def flops_of(function: Any, *arguments: Any, **options: Any) -> int:
    """What torch counts of a call, attention by its two products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 7), (7, 3)), ((2, 4, 5, 7), (2, 4, 7, 3)), ((4, 5, 7), (7, 3)), ((2, 1, 5, 7), (4, 7, 3))],
    ids=str,
)
def test_products_of_matrices_count_as_in_torch(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """Plain, batched and broadcast products."""
    expected = flops_of(torch.matmul, torch.empty(left), torch.empty(right))
    assert count_node("MatMul", left, right).flops == expected
    assert count_node("MatMulInteger", left, right, dtype=TensorProto.INT8).products == expected


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_gemm_counts_as_in_torch(trans_a: int, trans_b: int) -> None:
    """Whichever of its factors is transposed, and with its bias."""
    left, right = torch.empty(5, 7), torch.empty(7, 3)
    shapes = ((7, 5) if trans_a else (5, 7)), ((3, 7) if trans_b else (7, 3)), (3,)
    work = count_node("Gemm", *shapes, transA=trans_a, transB=trans_b)
    assert work.by_operator == {"Gemm": flops_of(torch.addmm, torch.empty(3), left, right)}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_count_as_in_torch(groups: int, stride: int) -> None:
    """Grouped, strided, dilated and padded; as floating-point numbers, as integers, and transposed."""
    source, weight = (2, 4, 9, 8), (6, 4 // groups, 3, 2)
    options: dict[str, Any] = {"stride": stride, "dilation": (2, 1), "padding": (1, 0), "groups": groups}
    expected = flops_of(torch.conv2d, torch.empty(source), torch.empty(weight), torch.empty(6), **options)
    spelled: dict[str, Any] = {"strides": [stride] * 2, "dilations": [2, 1], "pads": [1, 0, 1, 0], "group": groups}
    assert count_node("Conv", source, weight, (6,), **spelled).flops == expected
    assert count_node("ConvInteger", source, weight, dtype=TensorProto.INT8, **spelled).flops == expected
    back = (4, 6 // groups, 3, 2)
    expected = flops_of(torch.conv_transpose2d, torch.empty(source), torch.empty(back), **options)
    assert count_node("ConvTranspose", source, back, **spelled).flops == expected


@pytest.mark.parametrize("equation", ["bhqd,bhkd->bhqk", "ij,jk,kl->il", "bij,bjk->bik", "i,j->ij", "ij,ij->"])
def test_einsum_counts_as_in_numpy(equation: str) -> None:
    """As many operations as numpy says of the whole nest of loops."""
    terms = equation.partition("->")[0].split(",")
    shapes = [[2 + ord(letter) % 7 for letter in term] for term in terms]
    _, report = np.einsum_path(equation, *[np.empty(shape) for shape in shapes], optimize=False)
    assert (naive := re.search(r"Naive FLOP count:\s+(\S+)", report)) is not None
    assert count_node("Einsum", *shapes, equation=equation).flops == pytest.approx(float(naive[1]), rel=1e-3)


ATTENTIONS: list[tuple[tuple[tuple[int, ...], ...], dict[str, int]]] = [
    (((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {}),
    (((2, 9, 32), (2, 7, 32), (2, 7, 24)), {"q_num_heads": 4, "kv_num_heads": 4}),
    (((2, 4, 9, 8), (2, 2, 7, 8), (2, 2, 7, 6)), {}),
    (((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 8), (9, 7)), {}),
    (((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)), {"is_causal": 1}),
    (((2, 4, 30, 8), (2, 4, 30, 8), (2, 4, 30, 6), (), (2, 4, 50, 8), (2, 4, 50, 6)), {}),
]


@pytest.mark.parametrize(("shapes", "attributes"), ATTENTIONS, ids=str)
def test_attention_counts_as_its_definition(shapes: tuple[tuple[int, ...], ...], attributes: Mapping[str, int]) -> None:
    """One operator has the products of the function that ONNX defines it by: heads shared or not, masks, a past."""
    names = [f"x{number}" if shape else "" for number, shape in enumerate(shapes)]
    outputs = ["y", "present_key", "present_value"] if len(shapes) > 4 else ["y"]
    node = helper.make_node("Attention", names, outputs, **attributes)
    inputs = {f"x{number}": shape for number, shape in enumerate(shapes) if shape}
    work = count_model(make_model([node], inputs, ["y"]), inputs)
    expanded = count_model(expand(node, inputs), inputs)
    assert work.products == expanded.by_operator["MatMul"]
    # The definition scales both factors in place of the scores, and adds a mask wherever it makes one.
    assert work.flops - work.products == pytest.approx(expanded.flops - expanded.products, rel=0.35)


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes"),
    [
        ("Gelu", [(4, 64, 32)], {}),
        ("Gelu", [(4, 64, 32)], {"approximate": "tanh"}),
        ("Softmax", [(4, 64, 32)], {}),
        ("LogSoftmax", [(4, 64, 32)], {}),
        ("LayerNormalization", [(4, 64, 32), (32,), (32,)], {}),
        ("RMSNormalization", [(4, 64, 32), (32,)], {}),
        ("GroupNormalization", [(4, 32, 16, 16), (32,), (32,)], {"num_groups": 8}),
        ("Softplus", [(4, 64)], {}),
        ("HardSwish", [(4, 64)], {}),
    ],
    ids=str,
)
def test_composite_operators_count_as_their_definition(
    operator: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any]
) -> None:
    """They take about as many operations as the functions that ONNX defines them by, step by step."""
    inputs = {f"x{number}": shape for number, shape in enumerate(shapes)}
    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    work = count_model(make_model([node], inputs, ["y"]), inputs)
    expanded = count_model(expand(node, inputs), inputs)
    assert operator not in expanded.by_operator
    assert work.flops == pytest.approx(expanded.flops, rel=0.3)


def test_exported_models_count_as_in_torch(tiny_sources: dict[str, Path], tiny_bundles: dict[str, Path]) -> None:
    """The products of text encoder, denoiser and decoder are exactly those that torch counts of the source."""
    source, bundle = tiny_sources["sd1"], Bundle.open(tiny_bundles["sd1"])
    found = bundle_work(bundle, FORM, images=3, guided=True, width=48, height=32, steps=5)
    text = CLIPTextModel.from_pretrained(source / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    vae = AutoencoderKL.from_pretrained(source / "vae")
    factor = bundle.manifest.latent.vae_scale_factor
    latent = (4, 32 // factor, 48 // factor)
    ids = torch.zeros((1, 77), dtype=torch.long)
    expected = {
        "text_encoder": 2 * flops_of(text, ids),
        "plain_step": flops_of(unet, torch.zeros(6, *latent), torch.zeros(6), torch.zeros(6, 77, 32)),
        "vae_decoder": flops_of(vae.decode, torch.zeros(3, *latent)),
    }
    assert {name: found[name].work.products for name in expected} == expected
    # What torch leaves out is there, and little even in so small a model.
    assert all(1.002 < found[name].work.flops / found[name].work.products < 1.2 for name in expected)


def test_stages_share_the_work_of_the_whole_denoiser(tiny_bundles: dict[str, Path]) -> None:
    """Unguided and for one timestep, prompt, schedule and step have the products of the whole; the update is none."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    found = bundle_work(bundle, FORM, images=1, guided=False, width=32, height=32, steps=1, registers=2)
    stages = sum(found[name].work.products for name in ("prompt", "schedule", "step"))
    assert stages == found["plain_step"].work.products


def test_guidance_shares_work(tiny_bundles: dict[str, Path]) -> None:
    """A guided step does less than twice the work of one that is not, and a plain one twice as much."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    found = {
        guided: bundle_work(bundle, FORM, images=1, guided=guided, width=32, height=32, steps=1)
        for guided in (True, False)
    }
    plain, fused = ([found[guided][stage].work for guided in (True, False)] for stage in ("plain_step", "step"))
    assert plain[0].products == 2 * plain[1].products
    assert 1.2 * fused[1].products < fused[0].products < 2 * fused[1].products
    assert plain[0].bytes < 2 * plain[1].bytes  # the weights are read once


@pytest.mark.parametrize(("loop", "guided"), [("fused", True), ("plain", False)])
def test_what_is_counted_is_what_a_pipeline_runs(
    loop: str, guided: bool, tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes that the engines are given in a request come to the same work, call by call."""
    calls: dict[str, list[Work]] = {}
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", loop=loop) as pipeline:
        for component, engine in pipeline.engines.items():
            path = pipeline.bundle.graph_path(component, FORM)
            record(engine, path, calls.setdefault(component, []), monkeypatch)
        options = {"width": 32, "height": 48, "sampler": "euler", "guidance": 7.5 if guided else 1.0}
        pipeline("a red apple", images=2, steps=2, negative_prompt="blue", **options)
        bundle = pipeline.bundle
    found = bundle_work(bundle, FORM, images=2, guided=guided, width=32, height=48, steps=2, registers=1)
    names = {"text_encoder": "text_encoder", "prompt": "unet_prompt", "schedule": "unet_schedule"}
    names |= {"plain_step": "unet", "step": "unet_step", "vae_decoder": "vae_decoder"}
    for stage, component in names.items():
        if component in calls:
            seen = calls[component][:1] if stage.endswith("step") else calls[component]
            assert len(seen) == found[stage].calls
            assert sum((each for each in seen), Work(0, 0, {}, 0)) == found[stage].work
    assert len(calls["unet" if loop == "plain" else "unet_step"]) == 2


def record(engine: Engine, path: Path, seen: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count every call of an engine by the shapes of its inputs."""
    run = engine.run
    known: dict[str, Work] = {}

    def counted(feeds: Mapping[str, Any]) -> Any:
        shapes = {name: array.shape for name, array in feeds.items()}
        if str(shapes) not in known:
            known[str(shapes)] = count(path, shapes)
        seen.append(known[str(shapes)])
        return run(feeds)

    monkeypatch.setattr(engine, "run", counted)


def test_long_schedules_are_several_calls(tiny_bundles: dict[str, Path]) -> None:
    """As the loop does, no more than 64 rows at once; the weights are then read again."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    one, many = (
        bundle_work(bundle, FORM, images=1, guided=True, width=32, height=32, steps=steps)["schedule"]
        for steps in (1, 150)
    )
    assert (one.calls, many.calls) == (1, 3)
    assert many.work.flops == 150 * one.work.flops
    assert 3 * one.work.bytes < many.work.bytes < 150 * one.work.bytes


@pytest.mark.parametrize("number", ["int8", "fp8"])
@pytest.mark.parametrize("activations", [True, False])
def test_quantised_graphs_have_the_same_products(
    number: str, activations: bool, tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Rounding comes on top where activations are rounded; weights are rounded beforehand, and take a quarter."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    path = bundle.graph_path("unet_step", FORM)
    shapes = {
        each.name: [
            {"batch": 1, "rows": 2, "registers": 1, "terms": 3}.get(n, 8) if isinstance(n, str) else n
            for n in each.shape
        ]
        for each in bundle.graph("unet_step", FORM).inputs
    }
    model = ir.load(path)
    ranges = {layer.activation: 1.0 for layer in find_layers(model.graph)} if activations else None
    if number == "fp8":
        model.opset_imports[""] = 23
    quantize(model.graph, FORMATS[number], ranges)
    ir.save(model, tmp_path / "quantised.onnx")
    whole, quantised = count(path, shapes), count(tmp_path / "quantised.onnx", shapes)
    assert quantised.products == whole.products
    assert quantised.by_operator["Conv"] == whole.by_operator["Conv"]
    rounding = quantised.by_operator.get("QuantizeLinear", 0) + quantised.by_operator.get("DequantizeLinear", 0)
    assert quantised.flops - whole.flops == rounding
    assert (rounding > 0) is activations
    assert quantised.bytes < 0.4 * whole.bytes


def test_traffic_is_inputs_weights_and_outputs_once() -> None:
    """In their own types; weights that are read twice once, and rows that nothing gathers not at all."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT16),
    ]
    weights = {"table": np.zeros((1000, 8), np.float32), "w": np.zeros((8, 8), np.float32)}
    weights["unused"] = np.zeros(99, np.float32)
    model = make_model(nodes, {"ids": ["n"]}, ["y"], weights, dtype=TensorProto.INT64)
    assert count_model(model, {"ids": [5]}).bytes == 5 * 8 + 5 * 8 * 4 + 8 * 8 * 4 + 5 * 8 * 2
    assert count_model(model, {"ids": [5000]}).bytes == 5000 * 8 + 1000 * 8 * 4 + 8 * 8 * 4 + 5000 * 8 * 2


def test_weights_of_less_than_a_byte_are_packed() -> None:
    """Two of 4 bits a byte."""
    weight = helper.make_tensor("w", TensorProto.INT4, [8, 3], np.zeros(24, np.int8))
    node = helper.make_node("DequantizeLinear", ["w", "scale"], ["d"])
    product = helper.make_node("MatMul", ["x", "d"], ["y"])
    model = make_model([node, product], {"x": [2, 8]}, ["y"], {"scale": np.float32(1)})
    model.graph.initializer.append(weight)
    work = count_model(model, {"x": [2, 8]})
    assert work.bytes == 2 * 8 * 4 + 12 + 4 + 2 * 3 * 4
    assert work.by_operator == {"MatMul": 2 * 2 * 8 * 3}  # the weights are widened before the first run


def test_weights_in_other_files_are_not_read(tmp_path: Path) -> None:
    """A graph counts the same where the file of its weights is missing."""
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 64]}, ["y"], {"w": np.zeros((64, 64), np.float32)}
    )
    expected = count_model(model, {"x": [2, 64]})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert count(path, {"x": [2, 64]}) == expected


def test_lengths_are_followed_through_arithmetic() -> None:
    """Shapes that a graph computes from the shapes of its inputs are known, and their arithmetic is not counted."""
    constants = {"two": np.array([2]), "rest": np.array([-1]), "first": np.array([0]), "axis": np.array([0])}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "first", "two", "axis"], ["outer"]),
        helper.make_node("ReduceProd", ["outer"], ["rows"]),
        helper.make_node("Div", ["rows", "two"], ["half"]),
        helper.make_node("Concat", ["two", "half", "rest"], ["new"], axis=0),
        helper.make_node("Reshape", ["x", "new"], ["y"]),
        helper.make_node("MatMul", ["y", "w"], ["z"]),
    ]
    model = make_model(nodes, {"x": ["a", "b", 8]}, ["z"], constants | {"w": np.zeros((8, 3), np.float32)})
    work = count_model(model, {"x": [3, 4, 8]})
    assert work.by_operator == {"MatMul": 2 * 2 * 6 * 8 * 3}
    assert work.bytes == (96 + 24 + 36) * 4 + 4 * 8


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([helper.make_node("Fancy", ["x"], ["y"], domain="com.example")], "of no operator that ONNX defines"),
        ([helper.make_node("Det", ["x"], ["y"])], "whose operations are not known"),
        ([helper.make_node("NonZero", ["x"], ["y"])], "does not follow from the shapes"),
        ([helper.make_node("Relu", ["nothing"], ["y"])], "reads 'nothing', which nothing before it computes"),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], "does not fit its inputs"),
        ([helper.make_node("Relu", ["x"], ["y"], slope=1.0)], "does not fit its inputs"),
        ([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")], "interpolates"),
        ([helper.make_node("Einsum", ["x", "x"], ["y"], equation="...i,...i->...")], "leaves dimensions out"),
    ],
    ids=lambda value: value[0].op_type if isinstance(value, list) else "",
)
def test_what_cannot_be_counted_is_an_error(nodes: Sequence[NodeProto], message: str) -> None:
    """Never passed over: the message names the node."""
    weights = {"w": np.zeros((3, 3), np.float32), "scales": np.array([2, 2], np.float32)}
    model = make_model(nodes, {"x": [4, 4]}, ["y"], weights)
    if nodes[0].domain:
        model.opset_import.append(helper.make_opsetid(nodes[0].domain, 1))
    with pytest.raises(BundleError, match=message) as caught:
        count_model(model, {"x": [4, 4]})
    assert f"{nodes[0].op_type} 'y'" in str(caught.value)


def test_graphs_within_graphs_are_refused() -> None:
    """How often a branch or a loop runs does not stand in the graph."""
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "branch", [], [helper.make_empty_tensor_value_info("r")]
    )
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    model = make_model([node], {"x": [4]}, ["y"], {"condition": np.array(True)})
    with pytest.raises(BundleError, match="runs another graph inside"):
        count_model(model, {"x": [4]})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": [2, 3]}, "'b' is missing"),
        ({"a": [2, 3], "b": [3, 3], "c": [1]}, "'c' is too much"),
        ({"a": [2, 3, 1], "b": [3, 3]}, "does not fit"),
        ({"a": [2, 4], "b": [4, 3]}, "does not fit"),
        ({"a": [2, 3], "b": [3, 4]}, "does not fit"),
        ({"a": [0, 3], "b": [3, 3]}, "does not fit"),
    ],
    ids=str,
)
def test_shapes_must_fit_the_inputs(shapes: Mapping[str, Sequence[int]], message: str) -> None:
    """Names, ranks, fixed lengths, and symbols that stand for one length."""
    model = make_model([helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": ["n", 3], "b": ["m", "m"]}, ["y"])
    assert count_model(model, {"a": [2, 3], "b": [3, 3]}).flops == 36
    with pytest.raises(InvalidRequestError, match=message):
        count_model(model, shapes)


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    """A missing file and one of something else are errors of the bundle."""
    (tmp_path / "text").write_text("not a graph")
    for name in ("text", "nowhere"):
        with pytest.raises(BundleError, match="cannot be read as an ONNX model"):
            count(tmp_path / name, {})


def expand(node: NodeProto, inputs: Mapping[str, Sequence[int]]) -> ModelProto:
    """The function that ONNX defines an operator by, for inputs of these shapes."""
    schema = onnx.defs.get_schema(node.op_type, 23, "")
    types = [
        (helper.make_tensor_type_proto(FLOAT, inputs[name]) if name else onnx.TypeProto()).SerializeToString()
        for name in node.input
    ]
    if schema.has_context_dependent_function:
        body = schema.get_context_dependent_function(node.SerializeToString(), types)
    else:
        body = schema.function_body.SerializeToString()
    function = onnx.FunctionProto.FromString(body)
    names = dict(zip(function.input, node.input, strict=False)) | dict(zip(function.output, node.output, strict=False))
    given = {each.name: each for each in (*function.attribute_proto, *node.attribute)}
    for each in function.node:
        for ends in (each.input, each.output):
            ends[:] = [names.get(name, f"inner_{name}") if name else "" for name in ends]
        for attribute in each.attribute:
            if attribute.ref_attr_name:
                attribute.CopyFrom(given[attribute.ref_attr_name])
    return make_model(function.node, inputs, [node.output[0]], opset=function.opset_import[0].version)
