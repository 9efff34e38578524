"""Reading ``bundle.json``, from text to a :class:`~latentrt.runtime.bundle.manifest.Manifest`.

Reading trusts nothing. Every key is required, none is unknown, every value has a type and a range, and every
path is one that names the same file on every operating system and stays inside the bundle. Whatever breaks a
rule raises :class:`~latentrt.engines.errors.BundleError` with one sentence that names the key.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from latentrt.engines.base import DTYPES, TensorSpec
from latentrt.engines.checks import check_choice, check_integer, check_number, is_integer, show
from latentrt.engines.errors import BundleError, BundleVersionError

from .manifest import (
    ENGINES_DIRECTORY,
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    PRECISIONS,
    PREDICTION_TYPES,
    TOKENIZER_FILE,
    Adapter,
    Component,
    Defaults,
    FileEntry,
    Graph,
    Latent,
    Manifest,
    Source,
    Tokenizer,
)
from .paths import check_path, check_text

_MAX_NESTING = 16
_MAX_SETTINGS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

_T = TypeVar("_T")


def read_manifest(text: str, origin: str = MANIFEST_FILE) -> Manifest:
    """Read and check a manifest.

    Args:
        text: JSON.
        origin: Name of the text in messages.

    Raises:
        BundleVersionError: if it was written in another format.
        BundleError: if anything else is wrong with it.
    """
    try:
        return _manifest(_parse(text))
    except BundleError as error:
        raise type(error)(f"{origin}: {error}") from error.__cause__


# --- from JSON text to Python values


def _parse(text: str) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise BundleError(f"has {len(text):,} characters, expected at most {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded
        )
    except RecursionError as error:
        raise BundleError("is nested too deeply to be a manifest") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"is not JSON ({error})") from error
    return _object(value, "the manifest")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise BundleError(f"has the key {show(key)} twice in one object")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise BundleError(f"holds {name}, which is not a number that JSON has")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BundleError(f"holds the number {show(digits)}, which is too large")
    return value


def _bounded(digits: str) -> int:
    # Longer integers than 64 bits have no place in a manifest, and Python itself refuses to read very long ones.
    if len(digits) > 20:
        raise BundleError(f"holds the number {show(digits)}, which is too large")
    return int(digits)


# --- from Python values to records


def _wrong(key: str, value: object, expected: str) -> NoReturn:
    raise BundleError(f"{key} is {show(value)}, expected {expected}")


def _object(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(key, value, "an object")
    return value


def _keys(value: object, key: str, expected: Iterable[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    record, names = _object(value, key), tuple(expected)
    for name in names:
        if name not in record:
            raise BundleError(f"{key} lacks the key {name!r}")
    for name in record:
        if name not in names:
            raise BundleError(f"{key} has the unknown key {show(name)}, expected only {', '.join(names)}")
    return record


def _mapping(value: object, key: str, read: Callable[[Any, str], _T]) -> dict[str, _T]:
    """An object whose keys are names and whose values ``read`` takes together with their place."""
    return {_name(name, f"a name in {key}"): read(item, f"{key}.{name}") for name, item in _object(value, key).items()}


def _items(value: object, key: str, read: Callable[[Any, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        _wrong(key, value, "a list")
    return tuple(read(item, f"{key}[{index}]") for index, item in enumerate(value))


def _name(value: object, key: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        _wrong(key, value, "a name of at most 100 letters, digits, dots, dashes, pluses and underscores")
    return value


def _one_of(value: object, key: str, choices: tuple[str, ...]) -> str:
    return check_choice(key, value, choices, error=BundleError)


def _integer(value: object, key: str, low: int, high: int) -> int:
    return check_integer(key, value, low, high, error=BundleError)


def _number(value: object, key: str, low: float, high: float) -> float:
    return check_number(key, value, low, high, error=BundleError)


def _json_value(value: object, key: str, depth: int = 0) -> object:
    """Any JSON of bounded depth (numbers were checked while parsing)."""
    if depth > _MAX_NESTING:
        raise BundleError(f"{key} is nested too deeply, expected at most {_MAX_NESTING} levels")
    if isinstance(value, dict):
        return {check_text(name, f"a key in {key}"): _json_value(item, key, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item, key, depth + 1) for item in value]
    return check_text(value, key, limit=MAX_JSON_BYTES, empty=True) if isinstance(value, str) else value


def _tensor(value: object, key: str) -> TensorSpec:
    record = _keys(value, key, ("name", "dtype", "shape"))
    shape = _items(record["shape"], f"{key}.shape", _length)
    if len(shape) > 8:
        _wrong(f"{key}.shape", shape, "at most 8 dimensions")
    name = check_text(record["name"], f"{key}.name", limit=1024)
    return TensorSpec(name, _one_of(record["dtype"], f"{key}.dtype", DTYPES), shape)


def _length(value: object, key: str) -> int | str:
    return check_text(value, key, limit=100) if isinstance(value, str) else _integer(value, key, 1, 2**31 - 1)


def _tensors(value: object, key: str) -> tuple[TensorSpec, ...]:
    specs = _items(value, key, _tensor)
    if len({spec.name for spec in specs}) != len(specs):
        raise BundleError(f"{key} has two tensors of one name")
    return specs


def _graph(value: object, key: str) -> Graph:
    record = _keys(value, key, ("file", "precision", "opset", "inputs", "outputs", "external"))
    file = check_path(record["file"], f"{key}.file")
    # ONNX Runtime goes by this ending; with .ort it would read a format that nothing here has looked into.
    if not file.endswith(".onnx"):
        _wrong(f"{key}.file", file, "a file that ends with .onnx")
    return Graph(
        file,
        _one_of(record["precision"], f"{key}.precision", PRECISIONS),
        _integer(record["opset"], f"{key}.opset", 1, 100),
        _tensors(record["inputs"], f"{key}.inputs"),
        _tensors(record["outputs"], f"{key}.outputs"),
        _items(record["external"], f"{key}.external", check_path),
    )


def _component(value: object, key: str) -> Component:
    record = _keys(value, key, ("name", "graphs"))
    name = _name(record["name"], f"{key}.name")
    if name != key.rpartition(".")[2]:
        _wrong(f"{key}.name", name, "the name under which the component is listed")
    return Component(name, _mapping(record["graphs"], f"{key}.graphs", _graph))


def _file_entry(value: object, key: str) -> FileEntry:
    record = _keys(value, key, ("size", "sha256"))
    return FileEntry(_integer(record["size"], f"{key}.size", 0, 2**50), _digest(record["sha256"], f"{key}.sha256"))


def _files(value: object, key: str) -> dict[str, FileEntry]:
    entries = {}
    spellings: dict[str, str] = {}
    for path, item in _object(value, key).items():
        check_path(path, f"a path in {key}")
        entries[path] = _file_entry(item, f"{key}[{show(path)}]")
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in (MANIFEST_FILE, ENGINES_DIRECTORY) or folded.startswith(f"{ENGINES_DIRECTORY}/"):
            raise BundleError(f"{key} lists {show(path)}, which is the place of the manifest or of compiled engines")
        if folded in spellings:
            raise BundleError(
                f"{key} lists both {show(spellings[folded])} and {show(path)}, which are one file on some systems"
            )
        spellings[folded] = path
    for folded, path in spellings.items():
        parts = folded.split("/")
        for count in range(1, len(parts)):
            if (parent := "/".join(parts[:count])) in spellings:
                raise BundleError(
                    f"{key} lists {show(spellings[parent])} both as a file and as the directory of {show(path)}"
                )
    return entries


def _latent(value: object, key: str) -> Latent:
    record = _keys(value, key, ("channels", "factor", "scaling", "shift"))
    factor = record["factor"]
    if not is_integer(factor) or factor not in (1, 2, 4, 8, 16, 32, 64):
        _wrong(f"{key}.factor", factor, "a power of two from 1 to 64")
    return Latent(
        _integer(record["channels"], f"{key}.channels", 1, 128),
        factor,
        _number(record["scaling"], f"{key}.scaling", 1e-6, 1e6),
        _number(record["shift"], f"{key}.shift", -1e6, 1e6),
    )


def _tokenizer(value: object, key: str) -> Tokenizer:
    record = _keys(value, key, ("directory", "max_length", "pad_token_id", "kind"))
    return Tokenizer(
        check_path(record["directory"], f"{key}.directory"),
        _integer(record["max_length"], f"{key}.max_length", 2, 65536),
        _integer(record["pad_token_id"], f"{key}.pad_token_id", 0, 2**31 - 1),
        _name(record["kind"], f"{key}.kind"),
    )


def _defaults(value: object, key: str, factor: int) -> Defaults:
    record = _keys(value, key, ("sampler", "steps", "guidance", "width", "height", "clip_skip"))
    for side in ("width", "height"):
        if _integer(record[side], f"{key}.{side}", 1, 65536) % factor:
            _wrong(f"{key}.{side}", record[side], f"a multiple of {factor}, the latent factor")
    return Defaults(
        _name(record["sampler"], f"{key}.sampler"),
        _integer(record["steps"], f"{key}.steps", 1, 10_000),
        _number(record["guidance"], f"{key}.guidance", 0, 1000),
        record["width"],
        record["height"],
        _integer(record["clip_skip"], f"{key}.clip_skip", 0, 100),
    )


def _source(value: object, key: str) -> Source:
    record = _keys(value, key, ("name", "licence", "fingerprint", "adapters"))
    return Source(
        check_text(record["name"], f"{key}.name"),
        check_text(record["licence"], f"{key}.licence", empty=True),
        check_text(record["fingerprint"], f"{key}.fingerprint"),
        _items(record["adapters"], f"{key}.adapters", _adapter),
    )


def _adapter(value: object, key: str) -> Adapter:
    record = _keys(value, key, ("name", "sha256", "scale"))
    return Adapter(
        check_text(record["name"], f"{key}.name"),
        _digest(record["sha256"], f"{key}.sha256"),
        _number(record["scale"], f"{key}.scale", -1e6, 1e6),
    )


def _digest(value: object, key: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        _wrong(key, value, "64 hexadecimal digits in lower case")
    return value


def _settings(value: object, key: str) -> dict[str, bool | int | float | str]:
    """Plain values; the family itself checks which of them it has."""
    settings = _mapping(value, key, _setting)
    if len(settings) > _MAX_SETTINGS:
        raise BundleError(f"{key} has {len(settings)} entries, expected at most {_MAX_SETTINGS}")
    return settings


def _setting(value: object, key: str) -> bool | int | float | str:
    if isinstance(value, str):
        return check_text(value, key, limit=200, empty=True)
    if not isinstance(value, (bool, int, float)):
        _wrong(key, value, "true, false, a number or a text")
    return value


def _manifest(record: dict[str, Any]) -> Manifest:
    # The version comes first: a newer format may have other keys, and the way out is an upgrade, not a repair.
    if "format_version" not in record:
        raise BundleError("the manifest lacks the key 'format_version'")
    version = _integer(record["format_version"], "format_version", 1, 2**31 - 1)
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        remedy = "upgrade latentrt (pip install --upgrade latentrt)" if newer else "build the bundle again"
        raise BundleVersionError(
            f"format_version is {version}, but this version of latentrt reads format {FORMAT_VERSION}; {remedy}"
        )
    _keys(record, "the manifest", (each.name for each in fields(Manifest)))
    latent = _latent(record["latent"], "latent")
    manifest = Manifest(
        format_version=version,
        family=_name(record["family"], "family"),
        prediction_type=_one_of(record["prediction_type"], "prediction_type", PREDICTION_TYPES),
        components=_mapping(record["components"], "components", _component),
        files=_files(record["files"], "files"),
        latent=latent,
        tokenizers=_mapping(record["tokenizers"], "tokenizers", _tokenizer),
        scheduler={
            check_text(key, "a key in scheduler"): _json_value(value, f"scheduler.{key}")
            for key, value in _object(record["scheduler"], "scheduler").items()
        },
        defaults=_defaults(record["defaults"], "defaults", latent.vae_scale_factor),
        source=_source(record["source"], "source"),
        tools=_mapping(record["tools"], "tools", check_text),
        quality={
            check_text(key, "a key in quality", limit=1024): _number(value, f"quality.{key}", -1e300, 1e300)
            for key, value in _object(record["quality"], "quality").items()
        },
        settings=_settings(record["settings"], "settings"),
    )
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """Every file that a component or a tokenizer needs is listed."""
    for component in manifest.components.values():
        for form, graph in component.graphs.items():
            key = f"components.{component.name}.graphs.{form}"
            for path in (graph.file, *graph.external):
                if path not in manifest.files:
                    raise BundleError(f"{key} names {show(path)}, which files does not list")
            if len({graph.file, *graph.external}) != 1 + len(graph.external):
                raise BundleError(f"{key} names a file twice")
    for name, tokenizer in manifest.tokenizers.items():
        path = f"{tokenizer.directory}/{TOKENIZER_FILE}"
        if path not in manifest.files:
            raise BundleError(f"tokenizers.{name} needs {show(path)}, which files does not list")
