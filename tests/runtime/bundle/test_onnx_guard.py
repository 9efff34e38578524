"""The guard sees every tensor that protobuf sees, and refuses what is hostile or damaged."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, helper, numpy_helper

from latentrt.engines.errors import BundleIntegrityError
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.onnx_guard import check_graph, external_tensors
from latentrt.runtime.bundle.onnx_reader import ExternalTensor

GRAPH = Graph("unet/model.onnx", "fp32", 18, (), (), ("unet/model.onnx.data",))
FLOAT = TensorProto.FLOAT


def tensor(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), name)


def constant(name: str, *shape: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=tensor(f"{name}_value", *shape))


def sparse(name: str) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.array([1, 5], dtype=np.int64), f"{name}_indices")
    return helper.make_sparse_tensor(tensor(name, 2), indices, [2, 3])


def make_model() -> ModelProto:
    """A model with tensors in every place where ONNX allows one."""
    value = [helper.make_tensor_value_info("x", FLOAT, ["batch", 4])]
    result = [helper.make_tensor_value_info("y", FLOAT, None)]
    innermost = helper.make_graph([constant("in_loop", 3)], "loop", value, result, [tensor("loop_weight", 5)])
    loop = helper.make_node("Loop", ["n", "c", "x"], ["z"], body=innermost)
    then = helper.make_graph(
        [loop], "then", [], result, [tensor("then_weight", 4, 4)], sparse_initializer=[sparse("s1")]
    )
    other = helper.make_graph([constant("in_else", 1)], "else", [], result)
    lists = helper.make_node("Custom", ["x"], ["l"], domain="example")
    lists.attribute.append(helper.make_attribute("list", [tensor("t1", 2), tensor("t2", 0)]))
    lists.attribute.append(helper.make_attribute("graphs", [other, other]))
    lists.attribute.append(helper.make_attribute("sparse", sparse("s2")))
    lists.attribute.append(helper.make_attribute("sparses", [sparse("s3"), sparse("s4")]))
    lists.attribute.append(helper.make_attribute("ints", list(range(-3, 70))))
    lists.attribute.append(helper.make_attribute("texts", ["a", "b"]))
    lists.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(FLOAT, [1, "a"])))
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other, doc_string="text"),
        lists,
        helper.make_node("Twice", ["x"], ["t"], domain="local"),
    ]
    weights = [tensor("weight", 4, 8), tensor("scalar"), helper.make_tensor("typed", TensorProto.INT64, [2], [-1, 7])]
    graph = helper.make_graph(nodes, "g", value, result, weights, sparse_initializer=[sparse("s5")])
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [constant("b", 2, 2)], [helper.make_opsetid("", 18)], attributes=["alpha"],
        attribute_protos=[helper.make_attribute("beta", tensor("default", 6))],
    )  # fmt: skip
    model = helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 18)])
    model.metadata_props.add(key="note", value="x" * 10_000)
    training = model.training_info.add()
    training.initialization.CopyFrom(helper.make_graph([], "init", [], [], [tensor("init_weight", 3)]))
    training.algorithm.CopyFrom(helper.make_graph([constant("step", 7)], "step", [], []))
    return model


def messages(message: Message) -> Iterator[Message]:
    """A message and all below it, by protobuf's own reflection."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from messages(item)


def tensors_of(model: ModelProto) -> list[TensorProto]:
    return [message for message in messages(model) if isinstance(message, TensorProto)]


def seen_by_protobuf(model: ModelProto) -> list[ExternalTensor]:
    result = []
    for item in tensors_of(model):
        if item.data_location == TensorProto.EXTERNAL:
            info = {entry.key: entry.value for entry in item.external_data}
            length = int(info["length"]) if "length" in info else None
            offset = int(info.get("offset", "0"))
            where = info.get("location", ""), offset, length, info.get("checksum")
            result.append(ExternalTensor(item.name, item.data_type, tuple(item.dims), *where))
    return result


def save(model: ModelProto, root: Path, *, external: bool = True) -> Path:
    """Write a model as a graph of a bundle, all its tensors in the external file by default."""
    path = root / GRAPH.file
    path.parent.mkdir(exist_ok=True)
    data = bytearray()
    for item in tensors_of(model) if external else ():
        if not item.HasField("raw_data"):
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item), item.name))
        raw = item.raw_data
        onnx.external_data_helper.set_external_data(item, "model.onnx.data", offset=len(data), length=len(raw))
        item.ClearField("raw_data")
        data += raw + bytes(16)
    (root / GRAPH.external[0]).write_bytes(data)
    path.write_bytes(model.SerializeToString())
    return path


def by_text(tensors: Iterator[ExternalTensor] | list[ExternalTensor] | tuple[ExternalTensor, ...]) -> list[str]:
    return sorted(map(repr, tensors))


def test_every_place_of_a_tensor(tmp_path: Path) -> None:
    """Initializers, attributes, sub-graphs, functions, sparse tensors and training graphs are all visited."""
    model = make_model()
    path = save(model, tmp_path)
    expected = seen_by_protobuf(model)
    assert len(expected) == len(tensors_of(model)) == 25
    assert by_text(external_tensors(path)) == by_text(expected)
    assert by_text(check_graph(tmp_path, GRAPH)) == by_text(expected)


def test_inline_model(tmp_path: Path) -> None:
    """A model without external tensors passes and names none."""
    assert external_tensors(save(make_model(), tmp_path, external=False)) == ()


def test_files_of_the_onnx_package(tmp_path: Path) -> None:
    """What onnx.save_model writes passes, and ONNX Runtime then opens it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    values = [helper.make_tensor_value_info(name, FLOAT, [4, 8]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor("w", 4, 8)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / GRAPH.file
    path.parent.mkdir()
    onnx.save_model(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0, convert_attribute=True
    )
    (found,) = check_graph(tmp_path, GRAPH)
    assert (found.name, found.dims, found.nbytes) == ("w", (4, 8), 128)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones((4, 8), np.float32)})
    np.testing.assert_array_equal(result, np.arange(32, dtype=np.float32).reshape(4, 8) + 1)


@pytest.mark.parametrize("data_type", sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING}))
def test_size_of_every_element_type(tmp_path: Path, data_type: int) -> None:
    """The bytes of a tensor are counted for every element type as the onnx package counts them."""
    kind = helper.tensor_dtype_to_np_dtype(data_type)
    item = numpy_helper.from_array(np.zeros((3, 5), dtype=kind), "w")
    assert item.data_type == data_type
    model = helper.make_model(helper.make_graph([], "g", [], [], [item]))
    assert external_tensors(save(model, tmp_path, external=False)) == ()
    model.graph.initializer[0].raw_data = item.raw_data[:-1]
    with pytest.raises(BundleIntegrityError, match="not what its shape"):
        external_tensors(save(model, tmp_path, external=False))


def hostile(change: Callable[[TensorProto], object]) -> ModelProto:
    """A model whose only tensor is external, 4 x 8 floats at byte 0, and then changed."""
    item = tensor("w", 4, 8)
    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "128")):
        item.external_data.add(key=key, value=value)
    change(item)
    return helper.make_model(helper.make_graph([], "g", [], [], [item]))


def entry(key: str, value: str) -> Callable[[TensorProto], object]:
    def change(item: TensorProto) -> None:
        for other in item.external_data:
            if other.key == key:
                other.value = value
                return
        item.external_data.add(key=key, value=value)

    return change


def write_hostile(root: Path, change: Callable[[TensorProto], object], size: int = 128) -> None:
    (root / "unet").mkdir()
    (root / GRAPH.external[0]).write_bytes(bytes(size))
    (root / GRAPH.file).write_bytes(hostile(change).SerializeToString())


HOSTILE: list[tuple[Callable[[TensorProto], object], str]] = [
    (entry("location", "../outside.data"), "leaves its directory"),
    (entry("location", "a/../../outside.data"), "leaves its directory"),
    (entry("location", "../unet/model.onnx.data"), "leaves its directory"),
    (entry("location", "/etc/passwd"), "is absolute"),
    (entry("location", "C:\\windows\\win.ini"), "may not have"),
    (entry("location", "..\\outside.data"), "may not have"),
    (entry("location", "file:///etc/passwd"), "may not have"),
    (entry("location", "*/_ORT_MEM_ADDR_/*"), "address in memory"),
    (entry("location", "model.onnx.data\0.png"), "may not have"),
    (entry("location", "./model.onnx.data"), "ends with a dot"),
    (entry("location", ""), "not empty"),
    (entry("location", "model.onnx"), "manifest does not list"),
    (entry("location", "other.data"), "manifest does not list"),
    (entry("offset", "-1"), "not negative"),
    (entry("offset", "0x0"), "not negative"),
    (entry("offset", "1_0"), "not negative"),
    (entry("offset", " 1"), "not negative"),
    (entry("offset", "٣"), "not negative"),
    (entry("offset", "9" * 5000), "bytes"),
    (entry("offset", "1"), "which has 128"),
    (entry("offset", "9223372036854775807"), "which has 128"),
    (entry("length", "-128"), "not negative"),
    (entry("length", "129"), "which has 128"),
    (entry("length", "64"), "needs 128"),
    (entry("length", "9" * 19), "which has 128"),
    (entry("basepath", "/etc"), "has the key 'basepath'"),
    (entry("__class__", "x"), "has the key '__class__'"),
    (entry("checksum", "../x"), "hexadecimal"),
    (lambda item: item.external_data.add(key="location", value="model.onnx.data"), "at most once"),
    (lambda item: item.dims.__setitem__(0, -4), "negative length"),
    (lambda item: item.dims.__setitem__(0, 2**62), "elements"),
    (lambda item: item.dims.extend([2**20, 2**30]), "elements"),
    (lambda item: item.dims.extend([2**33, 2**33, 0]), "elements"),
    (lambda item: item.dims.extend([1] * 100), "dimensions"),
    (lambda item: item.dims.__setitem__(0, 5), "needs 160"),
    (lambda item: setattr(item, "data_type", TensorProto.DOUBLE), "needs 256"),
    (lambda item: setattr(item, "data_type", TensorProto.STRING), "made of texts"),
    (lambda item: setattr(item, "data_type", 99), "unknown element type"),
    (lambda item: item.ClearField("data_type"), "unknown element type"),
    (lambda item: setattr(item, "raw_data", bytes(128)), "elements here"),
    (lambda item: item.float_data.append(1), "elements here"),
    (lambda item: item.ClearField("data_location"), "contradicts itself"),
    (lambda item: item.ClearField("external_data"), "contradicts itself"),
    (lambda item: item.segment.MergeFrom(TensorProto.Segment(begin=1)), "has no field 3"),
    (lambda item: setattr(item, "name", "n" * 5000), "5000 bytes"),
]


@pytest.mark.parametrize(
    ("change", "message"), HOSTILE, ids=[f"{i}-{text[:20]}" for i, (_, text) in enumerate(HOSTILE)]
)
def test_hostile_tensors(tmp_path: Path, change: Callable[[TensorProto], object], message: str) -> None:
    """A tensor that names anything but its own bytes of a listed file is refused in one sentence."""
    write_hostile(tmp_path, change)
    with pytest.raises(BundleIntegrityError, match=re.escape(message)) as caught:
        check_graph(tmp_path, GRAPH)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 6000


def test_honest_tensor(tmp_path: Path) -> None:
    """The tensor that the hostile ones are made of passes, with and without the keys that may be left out."""
    write_hostile(tmp_path, lambda item: None)
    assert check_graph(tmp_path, GRAPH)[0].length == 128
    model = hostile(lambda item: [item.external_data.pop() for _ in range(2)])
    (tmp_path / GRAPH.file).write_bytes(model.SerializeToString())
    assert check_graph(tmp_path, GRAPH)[0].length is None
    (tmp_path / GRAPH.external[0]).write_bytes(bytes(200))
    with pytest.raises(BundleIntegrityError, match="has 200 bytes"):
        check_graph(tmp_path, GRAPH)


def node_model(node: onnx.NodeProto) -> ModelProto:
    return helper.make_model(helper.make_graph([node], "g", [], []))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (node_model(helper.make_node("EPContext", [], [], domain="com.microsoft", ep_cache_context="x")), "EPContext"),
        (node_model(helper.make_node("Other", [], [], ep_cache_context="../x")), "ep_cache_context"),
        (node_model(helper.make_node("Other", [], [], onnx_model_filename="../x")), "onnx_model_filename"),
    ],
    ids=["operator", "cache", "model"],
)
def test_compiled_files(tmp_path: Path, model: ModelProto, message: str) -> None:
    """Nodes through which ONNX Runtime loads compiled files are refused."""
    with pytest.raises(BundleIntegrityError, match=message):
        external_tensors(save(model, tmp_path, external=False))


def test_session_options_in_a_model(tmp_path: Path) -> None:
    """A model that brings options for the process that loads it is refused."""
    model = node_model(helper.make_node("Relu", ["x"], ["y"]))
    model.metadata_props.add(key="ort_config", value='{"session_options": {"enable_profiling": true}}')
    with pytest.raises(BundleIntegrityError, match="ort_config"):
        external_tensors(save(model, tmp_path, external=False))


def test_sparse_bomb(tmp_path: Path) -> None:
    """A sparse tensor of a few bytes that would fill the memory is refused."""
    model = make_model()
    model.graph.sparse_initializer[0].dims[:] = [2**20, 2**20]
    with pytest.raises(BundleIntegrityError, match="elements"):
        external_tensors(save(model, tmp_path))


def test_inline_tensor_without_its_elements(tmp_path: Path) -> None:
    """A tensor in the graph that claims a large shape without the elements is refused."""
    model = make_model()
    model.graph.initializer[2].dims[:] = [2**30]
    with pytest.raises(BundleIntegrityError, match="fewer elements"):
        external_tensors(save(model, tmp_path, external=False))


@pytest.mark.parametrize("external", [True, False])
def test_truncated_files(tmp_path: Path, external: bool) -> None:
    """A file cut off anywhere is refused or passes, and where it passes protobuf agrees on what it says."""
    content = save(make_model(), tmp_path, external=external).read_bytes()
    generator = random.Random(0)
    _compare(tmp_path, [content[: generator.randrange(len(content))] for _ in range(200)])


@pytest.mark.parametrize("external", [True, False])
def test_flipped_bytes(tmp_path: Path, external: bool) -> None:
    """Damaged bytes never raise anything else, and never hide from the guard what protobuf sees."""
    # The long note is left out, so that the damage meets structure.
    model = make_model()
    del model.metadata_props[:]
    content = save(model, tmp_path, external=external).read_bytes()
    generator = random.Random(1)
    damaged = []
    for _ in range(600):
        copy = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            copy[generator.randrange(len(copy))] = generator.randrange(256)
        damaged.append(bytes(copy))
    assert _compare(tmp_path, damaged) > 40  # enough pass for the comparison to mean something


def _compare(root: Path, contents: list[bytes]) -> int:
    """Guard each content; where it passes and protobuf parses it too, both see the same. Returns how many passed."""
    passed = 0
    for content in contents:
        (root / GRAPH.file).write_bytes(content)
        try:
            found = external_tensors(root / GRAPH.file)
        except BundleIntegrityError:
            continue
        passed += 1
        try:
            model = ModelProto.FromString(content)
        except DecodeError:
            continue
        assert by_text(found) == by_text(seen_by_protobuf(model))
    return passed


def test_symbolic_links(tmp_path: Path) -> None:
    """A symbolic link is refused, as the graph, as its weights, and as a directory on the way."""
    write_hostile(tmp_path, lambda item: None)
    for relative in (GRAPH.file, GRAPH.external[0]):
        path, moved = tmp_path / relative, tmp_path / "moved"
        path.rename(moved)
        path.symlink_to(moved)
        with pytest.raises(BundleIntegrityError, match="symbolic link"):
            check_graph(tmp_path, GRAPH)
        path.unlink()
        moved.rename(path)
    (tmp_path / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "unet").symlink_to("elsewhere")
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        check_graph(tmp_path, GRAPH)


def test_hard_links(tmp_path: Path) -> None:
    """A file with a second name, maybe one outside the bundle, is refused."""
    write_hostile(tmp_path, lambda item: None)
    os.link(tmp_path / GRAPH.external[0], tmp_path / "second name")
    with pytest.raises(BundleIntegrityError, match="hard link"):
        check_graph(tmp_path, GRAPH)


def test_time_is_linear(tmp_path: Path) -> None:
    """A megabyte of graph with 2,000 nodes takes a fraction of a second, and weights inside it take none."""
    nodes = []
    for index in range(2000):
        node = helper.make_node("Conv", [f"v{index}", "w"], [f"v{index + 1}"], name=f"node_{index}", strides=[1, 1])
        node.metadata_props.add(key="stack", value="x" * 400)
        nodes.append(node)
    weights = helper.make_tensor("w", FLOAT, [5_000_000], bytes(20_000_000), raw=True)
    path = save(helper.make_model(helper.make_graph(nodes, "g", [], [], [weights])), tmp_path, external=False)
    begin = time.process_time()
    assert external_tensors(path) == ()
    assert time.process_time() - begin < 2
