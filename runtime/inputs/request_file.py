"""Requests as JSON: in a file that somebody wrote, and in the PNG that was drawn.

Both have the options of :data:`~latentrt.runtime.request.options.OPTIONS` by name, with the types that are declared
there. Bounds are checked where every request is checked, in :mod:`.create`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from ..files import read_bounded, require_same
from ..images.png import program_name, read_text
from ..lora.reading import LoraFile
from ..request.kinds import Choice, Kind
from ..request.options import OPTIONS, Option
from ..request.request import Request
from ..text.textual_inversion import RecordedFile

KEYWORD = "latentrt"
"""Keyword of the PNG text chunk that holds a request."""
FORMAT = 1
"""Version of what that chunk holds."""
MOST_BYTES = 2**20 - 2**10
"""Longest JSON text; PNG readers take up to a megabyte of text."""

_TYPES: Mapping[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
_WORDS: Mapping[type, str] = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_NONE = object()
_RECORDED = {"path", "sha256"}
_OF_PIPELINE = ("embeddings", "loras")  # a request records them, and a pipeline is loaded with them
_LORA = ("path", "scale", "sha256")


@dataclass(frozen=True)
class RequestFile:
    """The content of a request file.

    Attributes:
        options: Keywords of :meth:`latentrt.runtime.Pipeline.__call__`, with ``prompt`` if the file has it.
        embeddings: Files by word, for :meth:`latentrt.runtime.Pipeline.load`.
        loras: LoRAs, for :meth:`latentrt.runtime.Pipeline.load`.
        hand_over: Fraction of the run at which a refiner went on; ``None`` without one.
        model: Name of the model; ``None`` if it was not recorded.
    """

    options: Mapping[str, Any]
    embeddings: Mapping[str, str] = field(default_factory=dict)
    loras: Sequence[LoraFile] = ()
    hand_over: float | None = None
    model: str | None = None


def read_request(path: str | os.PathLike[str]) -> RequestFile:
    """Read a JSON file with a request.

    Raises:
        InvalidRequestError: naming the first thing that is wrong with it, or with a file that it names.
    """
    label = f"the request in {os.fspath(path)!r}"
    return _request(_parsed(read_bounded(path, label, MOST_BYTES), label), label)


def read_png(path: str | os.PathLike[str]) -> RequestFile:
    """Read the request that a PNG was drawn with.

    Raises:
        InvalidRequestError: if the file holds no request, and as :func:`read_request`.
    """
    label = f"the request in {os.fspath(path)!r}"
    text = read_text(path, KEYWORD)
    if text is None:
        raise InvalidRequestError(
            f"{os.fspath(path)!r} does not say how it was drawn; expected a PNG that latentrt generate wrote"
        )
    document = _parsed(text.encode("utf-8", "surrogatepass"), label)
    if document.get("format") != FORMAT:
        raise InvalidRequestError(f"{label} has the format {_show(document.get('format'))}, expected {FORMAT}")
    request, model, hand_over = (document.get(name) for name in ("request", "model", "hand_over"))
    if not isinstance(request, dict):
        raise InvalidRequestError(f"{label} is missing, or no JSON object")
    found = _request(request, label)
    if hand_over is not None:
        hand_over = _value("hand_over", hand_over, float, label)
    return dataclasses.replace(found, model=model if isinstance(model, str) else None, hand_over=hand_over)


def record(
    request: Request, model: str, *, hand_over: float | None = None, changes: Mapping[str, Any] | None = None
) -> str | None:
    """The text of the PNG chunk for a request, or ``None`` if it is too long for one.

    Args:
        request: The request.
        model: Name of the model.
        hand_over: Fraction of the run at which a refiner went on; ``None`` without one.
        changes: Options to record with other values than the request's.
    """
    known = {"format": FORMAT, "program": program_name(), "model": model}
    known |= {} if hand_over is None else {"hand_over": hand_over}
    text = json.dumps({**known, "request": {**document(request), **(changes or {})}})
    return text if len(text) <= MOST_BYTES else None


def document(request: Request) -> dict[str, Any]:
    """Values of a request that differ from the defaults of :class:`Request`, as JSON has them."""
    defaults = {each.name: each.default for each in dataclasses.fields(Request)}
    values = {name: getattr(request, name) for name in (*_hints(), *_OF_PIPELINE)}
    given = {name: value for name, value in values.items() if value is not None and value != defaults[name]}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


def _parsed(data: bytes, label: str) -> dict[str, Any]:
    """A JSON object; names that come twice and NaN are refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
            raise InvalidRequestError(f"{label} has {_show(twice)} twice; give it once")
        return found

    def refuse(constant: str) -> None:
        raise InvalidRequestError(f"{label} holds {constant}, which JSON does not have")

    if len(data) > MOST_BYTES:
        raise InvalidRequestError(f"{label} has {len(data):,} bytes, expected at most {MOST_BYTES:,}")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except InvalidRequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{label} is no JSON: {str(error)[:100] or 'it is nested too deep'}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{label} is {_show(content)}, expected a JSON object with the options of a request")
    return content


def _request(content: Mapping[str, Any], label: str) -> RequestFile:
    """Options with their declared types; files that are named are there, and unchanged."""
    hints, options = _hints(), {}
    embeddings: dict[str, str] = {}
    loras: list[LoraFile] = []
    for name, value in content.items():
        if name == "$schema":
            continue
        if name == "embeddings":
            embeddings = _embeddings(value, label)
        elif name == "loras":
            loras = _loras(value, label)
        elif name in hints:
            options[name] = _value(name, value, hints[name], label)
        else:
            known = ", ".join(sorted({*hints, *_OF_PIPELINE}))
            raise InvalidRequestError(f"{label} has an unknown option {_show(name)}; known options: {known}")
    return RequestFile(options, embeddings, loras)


def _embeddings(value: Any, label: str) -> dict[str, str]:
    """A file for each word: as a request records them, or as somebody writes them, without hashes."""
    if isinstance(value, dict):
        value = [{"name": name, "path": path} for name, path in value.items()]
    found: dict[str, str] = {}
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict) or not {"name", "path"} <= set(each) <= {"name", "path", "sha256"}:
            raise InvalidRequestError(f"{label}: embeddings is {_show(value)}, expected names with paths of files")
        name, path = (_value(f"embeddings: {key}", each[key], str, label) for key in ("name", "path"))
        if "sha256" in each:
            sha256 = _value("embeddings: sha256", each["sha256"], str, label)
            require_same(path, sha256, f"the embedding {name!r} in {path!r}")
        found[name] = path
    return found


def _loras(value: Any, label: str) -> list[LoraFile]:
    """Files with scales: as a request records them, or as somebody writes them, without hashes or scales."""
    found = []
    for each in value if isinstance(value, list) else [value]:
        entry = {"path": each} if isinstance(each, str) else each
        if not isinstance(entry, dict) or not {"path"} <= set(entry) <= set(_LORA):
            raise InvalidRequestError(
                f"{label}: loras is {_show(value)}, expected a list of files, or of path and scale"
            )
        path, scale = (
            _value(f"loras: {key}", entry.get(key, 1.0), kind, label) for key, kind in (("path", str), ("scale", float))
        )
        if "sha256" in entry:
            sha256 = _value("loras: sha256", entry["sha256"], str, label)
            require_same(path, sha256, f"the LoRA in {path!r}")
        found.append(LoraFile(Path(path), float(scale)))
    return found


def _value(name: str, value: Any, hint: Any, label: str) -> Any:
    found = _converted(name, value, hint)
    if found is _NONE:
        raise InvalidRequestError(f"{label}: {name} is {_show(value)}, expected {' or '.join(_expected(hint))}")
    return found


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value of JSON as one of a Python type, or ``_NONE`` if it is none."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if kind in _TYPES:
            if type(value) is kind or (kind is float and type(value) is int):
                return value
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return _built(name, value, kind)
        elif _is_array(origin) and isinstance(value, list):
            fixed = origin is tuple and Ellipsis not in inner
            types_ = inner if fixed else inner[:1] * len(value)
            if len(types_) == len(value):
                found = [_converted(name, each, of) for each, of in zip(value, types_, strict=True)]
                if not any(each is _NONE for each in found):
                    return tuple(found)
    return _NONE


def _built(name: str, value: Mapping[str, Any], kind: type) -> Any:
    """A dataclass made of a JSON object; a record of a file becomes the file's name, if the file is unchanged."""
    hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
    hints = {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.init}
    if unknown := value.keys() - hints.keys():
        raise InvalidRequestError(f"{name} has an unknown entry {_show(min(unknown))}; known: {', '.join(hints)}")
    found = {key: _value(f"{name}: {key}", each, hints[key], "the request") for key, each in value.items()}
    if hints.keys() >= _RECORDED and hints.keys() - _RECORDED <= {"name"}:
        if not isinstance(found.get("path"), str) or not isinstance(found.get("sha256"), str):
            raise InvalidRequestError(f"{name} was not read from a file, so it cannot be read again; give it anew")
        require_same(found["path"], found["sha256"], f"{name} in {found['path']!r}")
        return found["path"]
    try:
        return kind(**found)
    except TypeError:
        missing = [each.name for each in dataclasses.fields(kind) if each.name not in found and _required(each)]
        raise InvalidRequestError(f"{name} is without {', '.join(missing)}") from None


def _required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _hints() -> dict[str, Any]:
    """The prompt and the options of a request, with their types."""
    return {"prompt": str, **{name: option.hint for name, option in OPTIONS.items()}}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_array(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _expected(hint: Any) -> list[str]:
    """Names of types in messages; types that JSON does not have are left out."""
    found = []
    for kind in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if kind in _WORDS:
            found.append(_WORDS[kind])
        elif dataclasses.is_dataclass(kind):
            found.append(f"an object with {', '.join(each.name for each in dataclasses.fields(kind))}")
        elif _is_array(origin):
            fixed = origin is tuple and Ellipsis not in inner
            found.append(f"a list of {len(inner) if fixed else 'any length'}, each {' or '.join(_expected(inner[0]))}")
    return found


def _show(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a request file; ``docs/request.schema.json`` holds it."""
    properties: dict[str, Any] = {
        "$schema": {"type": "string"},
        "prompt": {"description": "Text to draw.", "type": "string"},
    }
    for name, option in OPTIONS.items():
        properties[name] = {"description": _description(option), **_schema_of(option.hint, option.kind)}
    file = {"type": "string", "description": "Path of a safetensors file."}
    properties["embeddings"] = {
        "description": "Words that stand for vectors from files: by word the file, or as a PNG records them.",
        "anyOf": [{"type": "object", "additionalProperties": file}, _schema_of(tuple[RecordedFile, ...])],
    }
    properties["loras"] = {
        "description": "LoRAs to put on, in their order: files in safetensors, alone or each with its scale.",
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {"type": "number" if name == "scale" else "string"} for name in _LORA},
                    "required": ["path"],
                },
            ]
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A request of latentrt generate --request",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def schema_text() -> str:
    """The content of ``docs/request.schema.json``."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _description(option: Option) -> str:
    """An option in sentences, for the schema."""
    return f"{option.summary[0].upper()}{option.summary[1:]}. {option.details}".strip()


def _schema_of(hint: Any, kind: Kind | None = None) -> dict[str, Any]:
    """The schema of a Python type, of which types that JSON does not have are left out.

    Args:
        hint: The type.
        kind: The kind of the option whose type it is.
    """
    found: list[dict[str, Any]] = []
    for each in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin, inner = typing.get_origin(each), typing.get_args(each)
        if each is str and isinstance(kind, Choice):
            found.append({"enum": list(kind.words)})
        elif each in _TYPES:
            found.append({"type": _TYPES[each]})
        elif dataclasses.is_dataclass(each) and isinstance(each, type):
            found.append(_schema_of_record(each))
        elif _is_array(origin) and origin is tuple and Ellipsis not in inner:
            items = [_schema_of(item) for item in inner]
            found.append({"type": "array", "prefixItems": items, "minItems": len(inner), "maxItems": len(inner)})
        elif _is_array(origin):
            found.append({"type": "array", "items": _schema_of(inner[0])})
    if not found:
        raise TypeError(f"{hint} is no type that JSON has")
    return found[0] if len(found) == 1 else {"anyOf": found}


def _schema_of_record(record_type: type) -> dict[str, Any]:
    """The schema of a dataclass: an object with its fields."""
    hints = typing.get_type_hints(record_type, vars(sys.modules[record_type.__module__]))
    own = [each for each in dataclasses.fields(record_type) if each.init]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {each.name: _schema_of(hints[each.name]) for each in own},
        "required": [each.name for each in own if _required(each)],
    }
