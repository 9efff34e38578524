"""A reader of serialised ONNX models that trusts nothing, without the ``onnx`` package.

It visits every tensor of a model, wherever it hides, and refuses whatever is not plain. It is stricter than protobuf: a
field that ONNX does not define, a field of the wrong wire type, and a single field that comes twice are refused, so
that no two readers can disagree on the content of a file. It skips the weights' bytes, visits each field once, and
bounds nesting and counts.

Formats: https://protobuf.dev/programming-guides/encoding/ and ``onnx.proto`` of ONNX 1.23.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from latentrt.engines.errors import BundleIntegrityError

MAX_ELEMENTS = 2**40
"""Most elements that a tensor may claim; weights of diffusion models have fewer than ``2**36``."""

MAX_SPARSE_ELEMENTS = 2**31
"""Most elements that a sparse tensor may claim: a few bytes of file become that many in memory."""

_MAX_DEPTH = 100  # protobuf's own limit of nested messages
_MAX_FIELDS = 2_000_000  # a Stable Diffusion U-Net has fewer than 100,000
_MAX_TEXT = 4096
_MAX_DIMENSIONS = 64

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5

# Bits of an element by TensorProto.DataType; None for strings, which cannot be external.
_BITS: dict[int, int | None] = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),  # uint8, int8, bool, float8 in its five forms
    **dict.fromkeys((4, 5, 10, 16), 16),  # uint16, int16, float16, bfloat16
    **dict.fromkeys((1, 6, 12), 32),  # float, int32, uint32
    **dict.fromkeys((7, 11, 13, 14), 64),  # int64, double, uint64, complex64
    15: 128,  # complex128
    **dict.fromkeys((21, 22, 23), 4),  # uint4, int4, float4e2m1
    **dict.fromkeys((25, 26), 2),  # uint2, int2
    **dict.fromkeys((27, 28), 6),  # float6e2m3, float6e3m2
    8: None,
}

_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9A-Fa-f]{1,128}", re.ASCII)

# Nodes and metadata through which a graph can name a file, or settings, without an external tensor:
# ONNX Runtime's compiled sub-graphs, and session options inside a model.
_FORBIDDEN_OPERATORS = frozenset({b"EPContext"})
_FORBIDDEN_ATTRIBUTES = frozenset({b"ep_cache_context", b"onnx_model_filename"})
_FORBIDDEN_METADATA = frozenset({b"ort_config"})


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose elements are in another file.

    Attributes:
        name: Name in the graph; may be empty.
        data_type: ``TensorProto.DataType``.
        dims: Shape.
        location: Path of the file, relative to the graph's directory, as the graph gives it.
        offset: First byte.
        length: Number of bytes; None if the graph gives none, which means up to the end of the file.
        checksum: SHA-1 if the graph gives one; nobody checks it.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int | None
    checksum: str | None

    @property
    def nbytes(self) -> int:
        """Bytes that shape and type call for."""
        return (math.prod(self.dims) * (_BITS[self.data_type] or 0) + 7) // 8


@dataclass(frozen=True)
class _Field:
    name: str
    wires: tuple[int, ...]
    repeated: bool
    message: str | None  # of those in SCHEMA; other messages are skipped like texts


def _message(definition: str) -> dict[int, _Field]:
    """Fields by number, from entries ``number:name:type``; a ``*`` at the end stands for repeated."""
    wires = {"int": _VARINT, "float": _I32, "double": _I64}
    result = {}
    for entry in definition.split():
        number, name, kind = entry.rstrip("*").split(":")
        repeated = entry.endswith("*")
        wire = wires.get(kind, _LEN)
        # Numbers that repeat may come one by one or packed into one field.
        allowed = (wire, _LEN) if repeated and wire != _LEN else (wire,)
        result[int(number)] = _Field(name, allowed, repeated, kind if kind.endswith("Proto") else None)
    return result


# Names and numbers from onnx.proto. Messages in which no tensor can be are "skip", like texts: types, value
# infos, annotations, device configurations, operator set ids. Reserved fields are left out, and so refused.
SCHEMA = {
    "ModelProto": _message(
        "1:ir_version:int 2:producer_name:text 3:producer_version:text 4:domain:text 5:model_version:int "
        "6:doc_string:text 7:graph:GraphProto 8:opset_import:skip* 14:metadata_props:EntryProto* "
        "20:training_info:TrainingInfoProto* 25:functions:FunctionProto* 26:configuration:skip*"
    ),
    "TrainingInfoProto": _message(
        "1:initialization:GraphProto 2:algorithm:GraphProto 3:initialization_binding:skip* 4:update_binding:skip*"
    ),
    "FunctionProto": _message(
        "1:name:text 4:input:text* 5:output:text* 6:attribute:text* 7:node:NodeProto* 8:doc_string:text "
        "9:opset_import:skip* 10:domain:text 11:attribute_proto:AttributeProto* 12:value_info:skip* "
        "13:overload:text 14:metadata_props:skip*"
    ),
    "GraphProto": _message(
        "1:node:NodeProto* 2:name:text 5:initializer:TensorProto* 10:doc_string:text 11:input:skip* 12:output:skip* "
        "13:value_info:skip* 14:quantization_annotation:skip* 15:sparse_initializer:SparseTensorProto* "
        "16:metadata_props:skip*"
    ),
    "NodeProto": _message(
        "1:input:text* 2:output:text* 3:name:text 4:op_type:text 5:attribute:AttributeProto* 6:doc_string:text "
        "7:domain:text 8:overload:text 9:metadata_props:skip* 10:device_configurations:skip*"
    ),
    "AttributeProto": _message(
        "1:name:text 2:f:float 3:i:int 4:s:text 5:t:TensorProto 6:g:GraphProto 7:floats:float* 8:ints:int* "
        "9:strings:text* 10:tensors:TensorProto* 11:graphs:GraphProto* 13:doc_string:text 14:tp:skip "
        "15:type_protos:skip* 20:type:int 21:ref_attr_name:text 22:sparse_tensor:SparseTensorProto "
        "23:sparse_tensors:SparseTensorProto*"
    ),
    "SparseTensorProto": _message("1:values:TensorProto 2:indices:TensorProto 3:dims:int*"),
    "TensorProto": _message(
        "1:dims:int* 2:data_type:int 4:float_data:float* 5:int32_data:int* 6:string_data:text* 7:int64_data:int* "
        "8:name:text 9:raw_data:text 10:double_data:double* 11:uint64_data:int* 12:doc_string:text "
        "13:external_data:EntryProto* 14:data_location:int 16:metadata_props:skip*"
    ),
    "EntryProto": _message("1:key:text 2:value:text"),
}
_ELEMENT_FIELDS = frozenset({"float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"})


class OnnxReader:
    """Walks one serialised ModelProto."""

    def __init__(self, data: mmap.mmap, label: str) -> None:
        self._data = data
        self._label = label
        self._remaining = _MAX_FIELDS
        self.found: list[ExternalTensor] = []
        self.nodes = 0
        self.weights = 0
        self.weight_bytes = 0

    def read(self) -> None:
        """Walk the whole model."""
        self._walk("ModelProto", 0, len(self._data), 0)

    def _refuse(self, reason: str) -> NoReturn:
        raise BundleIntegrityError(f"{self._label} is not an ONNX model that can be trusted: {reason}")

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """An unsigned number of up to 64 bits and the position behind it."""
        value = shift = 0
        while True:
            if position >= end:
                self._refuse("it is cut off inside a number")
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if value >> 64 or (shift == 70 and byte >= 0x80):
                self._refuse(f"a number before byte {position} has more than 64 bits")
            if byte < 0x80:
                return value, position

    def _fields(self, message: str, position: int, end: int) -> Iterator[tuple[_Field, int, int]]:
        """Fields of a message: with the number and -1 if it is a varint, else with begin and end of the bytes."""
        schema, data, seen = SCHEMA[message], self._data, set()
        while position < end:
            self._remaining -= 1
            if self._remaining < 0:
                self._refuse(f"it has more than {_MAX_FIELDS:,} fields")
            start = position
            tag, position = (data[start], start + 1) if data[start] < 0x80 else self._varint(start, end)
            field, wire = schema.get(tag >> 3), tag & 7
            if field is None:
                self._refuse(f"{message} has no field {tag >> 3} (byte {start})")
            if wire not in field.wires:
                self._refuse(f"{message}.{field.name} has wire type {wire} (byte {start})")
            if not field.repeated:
                if tag in seen:
                    self._refuse(f"{message}.{field.name} comes twice (byte {start})")
                seen.add(tag)
            if wire == _VARINT:
                value, position = self._varint(position, end)
                yield field, value, -1
                continue
            if wire == _LEN:
                length, position = self._varint(position, end)
            else:
                length = 4 if wire == _I32 else 8
            if length > end - position:
                self._refuse(f"{message}.{field.name} reaches beyond its end (byte {start})")
            yield field, position, position + length
            position += length

    def _walk(self, message: str, begin: int, end: int, depth: int) -> None:
        """Visit a message and the messages inside it."""
        if depth > _MAX_DEPTH:
            self._refuse(f"its messages are nested more than {_MAX_DEPTH} deep")
        sparse_dims: list[int] = []
        for field, low, high in self._fields(message, begin, end):
            if field.message == "TensorProto":
                elements, size = self._tensor(low, high)
                if field.name == "initializer":
                    self.weights += elements
                    self.weight_bytes += size
            elif field.message == "EntryProto":
                key, _ = self._entry(low, high)
                if key in _FORBIDDEN_METADATA:
                    self._refuse(f"its metadata sets {key.decode()!r}, options of the process that loads it")
            elif field.message is not None:
                self.nodes += field.message == "NodeProto"
                self._walk(field.message, low, high, depth + 1)
            elif message == "SparseTensorProto":
                sparse_dims += self._numbers(low, high)
                self._elements(sparse_dims, MAX_SPARSE_ELEMENTS)
            elif field.name == "op_type" and self._bytes(low, high) in _FORBIDDEN_OPERATORS:
                self._refuse("it has a node EPContext, which stands for a compiled file outside the graph")
            elif (
                message == "AttributeProto" and field.name == "name" and self._bytes(low, high) in _FORBIDDEN_ATTRIBUTES
            ):
                self._refuse(
                    f"it has a node with the attribute {self._bytes(low, high).decode()!r}, which names a file"
                )

    def _bytes(self, begin: int, end: int) -> bytes:
        if end - begin > _MAX_TEXT:
            self._refuse(f"a name at byte {begin} has {end - begin} bytes")
        return self._data[begin:end]

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            self._refuse(f"the text {value[:40]!r} is not UTF-8")

    def _entry(self, begin: int, end: int) -> tuple[bytes, tuple[int, int]]:
        """Key of a StringStringEntryProto, and where its value is."""
        key, value = b"", (begin, begin)
        for field, low, high in self._fields("EntryProto", begin, end):
            if field.name == "key":
                key = self._bytes(low, high)
            else:
                value = low, high
        return key, value

    def _numbers(self, low: int, high: int) -> list[int]:
        """The numbers of a repeated int64 field, be it packed or not."""
        values = []
        if high < 0:
            values.append(low)
        else:
            while low < high:
                value, low = self._varint(low, high)
                values.append(value)
                if len(values) > _MAX_DIMENSIONS:
                    self._refuse(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
        return [value - 2**64 if value >> 63 else value for value in values]

    def _elements(self, dims: list[int], limit: int) -> int:
        """Number of elements of a shape whose every partial product, too, is sane."""
        if len(dims) > _MAX_DIMENSIONS:
            self._refuse(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
        if any(length < 0 for length in dims):
            self._refuse(f"a tensor has the shape {dims}, with a negative length")
        if math.prod(filter(None, dims)) > limit:
            self._refuse(f"a tensor has the shape {dims}, which is more than {limit} elements")
        return math.prod(dims)

    def _tensor(self, begin: int, end: int) -> tuple[int, int]:
        """Check a TensorProto; keep it if its elements are in another file.

        Returns:
            Elements and bytes.
        """
        name, data_type, data_location = b"", 0, 0
        dims: list[int] = []
        entries: dict[str, str] = {}
        raw: int | None = None
        room = 0  # most elements that the typed fields can hold: four to a byte, of two bits each
        for field, low, high in self._fields("TensorProto", begin, end):
            if field.name == "name":
                name = self._bytes(low, high)
            elif field.name == "data_type":
                data_type = low
            elif field.name == "data_location":
                data_location = low
            elif field.name == "dims":
                dims += self._numbers(low, high)
            elif field.name == "raw_data":
                raw = high - low
            elif field.name in _ELEMENT_FIELDS:
                room += 4 * max(1, high - low)
            elif field.name == "external_data":
                self._external_entry(entries, low, high)
        if data_type not in _BITS:
            self._refuse(f"a tensor has the unknown element type {data_type}")
        elements, bits = self._elements(dims, MAX_ELEMENTS), _BITS[data_type]
        label = self._text(name)
        if data_location not in (0, 1) or bool(entries) != (data_location == 1):
            self._refuse(f"tensor {label!r} contradicts itself on whether it is in another file")
        if data_location == 1:
            if raw is not None or room or bits is None:
                self._refuse(f"tensor {label!r} is in another file but has elements here, or is made of texts")
            self._keep(label, data_type, dims, entries)
        elif raw is not None:
            if room or bits is None or raw != (elements * bits + 7) // 8:
                self._refuse(f"tensor {label!r} has {raw} bytes, which is not what its shape {dims} needs")
        elif elements > room:
            self._refuse(f"tensor {label!r} has fewer elements than its shape {dims} needs")
        return elements, (elements * (bits or 0) + 7) // 8

    def _external_entry(self, entries: dict[str, str], begin: int, end: int) -> None:
        key_bytes, (low, high) = self._entry(begin, end)
        key = self._text(key_bytes)
        if key not in _EXTERNAL_KEYS or key in entries:
            self._refuse(f"external data has the key {key!r}, expected {', '.join(_EXTERNAL_KEYS)}, each at most once")
        entries[key] = self._text(self._bytes(low, high))

    def _keep(self, name: str, data_type: int, dims: list[int], entries: dict[str, str]) -> None:
        for key in ("offset", "length"):
            if not _DECIMAL.fullmatch(entries.get(key, "0")):
                self._refuse(f"tensor {name!r} has the {key} {entries[key]!r}, expected a number that is not negative")
        if not _CHECKSUM.fullmatch(entries.get("checksum", "0")):
            self._refuse(f"tensor {name!r} has the checksum {entries['checksum']!r}, expected hexadecimal digits")
        length = entries.get("length")
        self.found.append(
            ExternalTensor(
                name=name,
                data_type=data_type,
                dims=tuple(dims),
                location=entries.get("location", ""),
                offset=int(entries.get("offset", "0")),
                length=None if length is None else int(length),
                checksum=entries.get("checksum"),
            )
        )
