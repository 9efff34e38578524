"""Small bundles, which a number tells apart. Writers in child processes load this file by its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latentrt.runtime.bundle.manifest import Component, Defaults, Graph, Latent, Manifest, Source, Tokenizer
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import BundleWriter, write_bundle

FORM = "opset18-fp32"
GRAPH = Graph("unet/model.onnx", "fp32", 18, (), (), ("unet/model.onnx.data",))
MANIFEST = Manifest(
    format_version=2,
    family="sd1",
    prediction_type="epsilon",
    components={"unet": Component("unet", {FORM: GRAPH})},
    files={},
    latent=Latent(4, 8, 0.18215, 0.0),
    tokenizers={"tokenizer": Tokenizer("tokenizer", 77, 0)},
    scheduler={},
    defaults=Defaults("ddim", 20, 7.5, 64, 64, 0),
    source=Source("test", "CC0", "0"),
    tools={},
    quality={},
)


def fill(writer: BundleWriter, value: int = 0, external: str = "model.onnx.data") -> None:
    """Put a small model and a tokenizer into a bundle; ``value`` tells bundles apart."""
    for name in ("unet", "tokenizer"):
        (writer.directory / name).mkdir()
    (writer.directory / "tokenizer" / "tokenizer.json").write_text("{}")
    weight = numpy_helper.from_array(np.full((4, 8), value, np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.external_data_helper.set_external_data(weight := model.graph.initializer[0], external, offset=0, length=128)
    (writer.directory / GRAPH.external[0]).write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    (writer.directory / GRAPH.file).write_bytes(model.SerializeToString())


def build(target: Path, value: int = 0, extra: Callable[[BundleWriter], object] = lambda writer: None) -> Path:
    """Write a bundle, with something ``extra`` just before it is committed."""
    with write_bundle(target) as writer:
        fill(writer, value)
        extra(writer)
        writer.commit(MANIFEST)
    return target


def value_of(target: Path) -> float:
    """Open a bundle with all checks and read which one it is."""
    opened = Bundle.open(target, verify_hash=True)
    opened.graph_path("unet", FORM)
    return float(np.frombuffer(opened.file(GRAPH.external[0]).read_bytes(), np.float32)[0])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
