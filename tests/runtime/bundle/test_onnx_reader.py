"""The reader of ONNX files knows the fields that ONNX has, and refuses bytes that are no model."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.external_data_helper
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import AttributeProto, ModelProto, TensorProto

from latentrt.engines.errors import BundleIntegrityError
from latentrt.runtime.bundle import onnx_reader
from latentrt.runtime.bundle.onnx_guard import external_tensors

FLOAT = TensorProto.FLOAT


def _holds_tensors(descriptor: Descriptor, below: frozenset[str] = frozenset()) -> bool:
    if descriptor.name == "TensorProto":
        return True
    children = [field.message_type for field in descriptor.fields if field.message_type is not None]
    known = below | {descriptor.name}
    return any(_holds_tensors(child, known) for child in children if child.name not in known)


@pytest.mark.parametrize("name", sorted(set(onnx_reader.SCHEMA) - {"EntryProto"}))
def test_table_of_fields(name: str) -> None:
    """The reader knows all fields of the installed onnx by number and name, and enters all that can hold a tensor."""
    descriptor = getattr(onnx, name, None) or getattr(onnx.onnx_ml_pb2, name)
    defined = {field.number: field for field in descriptor.DESCRIPTOR.fields if field.name != "segment"}
    table = onnx_reader.SCHEMA[name]
    assert {number: field.name for number, field in table.items()} == {n: field.name for n, field in defined.items()}
    for number, field in defined.items():
        assert table[number].repeated == field.is_repeated
        if field.message_type is not None and _holds_tensors(field.message_type):
            assert table[number].message == field.message_type.name


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field in the wire format."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def nested(levels: int) -> bytes:
    """A model of graphs in attributes of nodes of graphs: three messages to a level."""
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"ORTM" * 10, "no field 9"),
        (b"\x00\x00", "has no field 0"),
        (b"\x08", "cut off"),
        (b"\x08\xff", "cut off"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "64 bits"),
        (b"\x80" * 11, "64 bits"),
        (varint(7 << 3 | 3), "wire type 3"),
        (varint(7 << 3 | 4), "wire type 4"),
        (varint(1 << 3 | 6), "wire type 6"),
        (varint(7 << 3 | 0) + b"\x01", "wire type 0"),
        (varint(99 << 3 | 2) + b"\x00", "no field 99"),
        (varint(7 << 3 | 2) + varint(2**63), "beyond its end"),
        (varint(7 << 3 | 2) + varint(5) + b"abc", "beyond its end"),
        (field(7, b"") + field(7, b""), "graph comes twice"),
        (nested(40), "nested more than"),
        (nested(2000), "nested more than"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_not_a_model(tmp_path: Path, content: bytes, message: str) -> None:
    """Bytes that are no model, or that two readers could read differently, are refused."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=message):
        external_tensors(path)


def test_moderate_nesting(tmp_path: Path) -> None:
    """Nesting that protobuf itself can read is read."""
    path = tmp_path / "model.onnx"
    path.write_bytes(nested(30))
    assert external_tensors(path) == ()
    ModelProto.FromString(path.read_bytes())


def test_merged_tensor(tmp_path: Path) -> None:
    """Two halves of one attribute's tensor, each harmless, that protobuf would merge to an external one are refused."""
    location = TensorProto(data_location=TensorProto.EXTERNAL)
    rest = TensorProto(data_type=FLOAT, dims=[0])
    rest.external_data.add(key="location", value="/etc/passwd")
    attribute = field(5, location.SerializeToString()) + field(5, rest.SerializeToString())
    assert AttributeProto.FromString(attribute).t.data_location == TensorProto.EXTERNAL
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, field(1, field(5, attribute))))
    with pytest.raises(BundleIntegrityError):
        external_tensors(path)


def test_too_many_fields(tmp_path: Path) -> None:
    """A file of millions of empty fields is refused before it takes long."""
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, b"\x0a\x00" * 3_000_000))
    with pytest.raises(BundleIntegrityError, match="more than 2,000,000 fields"):
        external_tensors(path)
