"""Measure the highest rates of the machine: products of matrices by the engines' own libraries, and copies of memory.

Steps are compared with rates of the same minutes, not with a data sheet, so that clock rates, threads and other load
are the same as for the contenders. The ceiling of arithmetic is the best median rate of a chain of products of square
matrices, over the libraries and sizes that were tried; that of memory is the median rate of a copy by several threads.

Two kinds of work can exceed a ceiling: a convolution by Winograd's algorithm does fewer multiplications than are
counted for it, and traffic that stays in caches is faster than memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines import Engine, onnxrt
from latentrt.engines.base import check_threads
from latentrt.engines.checks import check_integer, is_number
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.openvino import engine as ov
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions

from ..machine import usable_cpus

SIZES = (1024, 2048, 4096)
"""Rows and columns of the matrices: a product of 1024 does 340 operations a byte, far more than a processor needs to
be bound by arithmetic; the larger ones have enough work for many cores."""

CHAIN = 4
"""Products in one call, each of the last one's result, which share the call's overhead and the copy of its output."""

PRECISIONS = ("fp32", "bf16", "int8")
"""Precisions of the products that are measured."""

_FEWEST = 3  # samples of which a median is taken

_LEAST_COPIED = 256 << 20


@dataclass(frozen=True)
class _Candidate:
    """A library that computes in one precision: how to open a graph with it."""

    library: str
    make: Callable[[Path], Engine]


def measure_ceilings(
    threads: int, *, seconds: float = 4.0, sizes: Sequence[int] = SIZES, copied: int | None = None
) -> dict[str, Any]:
    """Measure the ceilings of this machine's processor.

    Args:
        threads: Threads of the libraries and of the copy; 0 leaves the choice to the libraries, and copies with one
            thread a physical core.
        seconds: Approximate time to measure each precision, and the copy, without compiling.
        sizes: Rows and columns of the matrices, ascending. The first is always measured, a larger one where three
            samples of it fit the time.
        copied: Bytes of the array that is copied, at least 8 a thread; four times the last cache (as STREAM asks,
            McCalpin 1995), and at least 256 MiB, if left out. Twice that much memory is needed.

    Returns:
        ``threads``: threads of the copy. ``matmul``: for each of :data:`PRECISIONS` either ``flops_per_second``, the
        ceiling, with its ``samples`` (operations a second, too) and the ``library`` and size that reached it, or
        ``unavailable`` with the reason. ``copy``: ``bytes_per_second``, bytes read and bytes written together, with its
        ``samples``.

    Raises:
        InvalidRequestError: if ``threads``, ``seconds``, ``sizes`` or ``copied`` is out of range.
        EngineError: if a library fails.
    """
    check_threads(threads)
    for size in sizes:
        check_integer("a size of matrices", size, 1)
    if not (is_number(seconds) and seconds > 0) or not sizes or list(sizes) != sorted(sizes):
        raise InvalidRequestError(f"ceilings cannot be measured for {seconds} seconds with matrices of {list(sizes)}")
    used = threads or physical_cores()
    matmul: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="latentrt-ceilings-") as directory:
        for precision in PRECISIONS:
            candidates, refused = _candidates(precision, threads)
            if not candidates:
                matmul[precision] = {"unavailable": "; ".join(refused)}
                continue
            share = seconds / len(candidates)
            measured = [
                each
                for candidate in candidates
                for each in _measure_matmul(candidate, precision, sizes, share, Path(directory))
            ]
            matmul[precision] = max(measured, key=lambda each: float(each["flops_per_second"]))
    return {"threads": used, "matmul": matmul, "copy": _measure_copy(used, seconds, copied)}


def physical_cores() -> int:
    """Cores that this process may use, without the second threads of a core."""
    allowed = usable_cpus()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _candidates(precision: str, threads: int) -> tuple[list[_Candidate], list[str]]:
    """Libraries that compute in a precision on this machine, and why others do not."""
    found, refused = [], []
    if precision == "bf16":
        refused.append("ONNX Runtime has no bf16 arithmetic on a CPU")
    else:
        options = OnnxRuntimeOptions(threads=threads)
        version = onnxrt.load_sdk().__version__
        found.append(_Candidate(f"ONNX Runtime {version}", lambda path: OnnxRuntimeEngine(path, options)))
    try:
        ov.require_precision(ov.load_core(), precision)
        version = str(ov.load_sdk().__version__).partition("-")[0]
        settings = OpenVinoOptions(precision=precision, threads=threads)
        found.append(_Candidate(f"OpenVINO {version}", lambda path: OpenVinoEngine(path, settings)))
    except EngineUnavailableError as error:
        refused.append(str(error))
    return found, refused


def _measure_matmul(
    candidate: _Candidate, precision: str, sizes: Sequence[int], seconds: float, directory: Path
) -> list[dict[str, Any]]:
    """The ceiling's entry for each size that could be measured in the time."""
    found: list[dict[str, Any]] = []
    left, previous, expected = seconds, 0, 0.0
    for number, size in enumerate(sizes):
        if found and left < _FEWEST * expected * (size / previous) ** 3:
            break
        path = directory / f"{precision}-{size}.onnx"
        if not path.exists():
            onnx.save(product_graph(size, quantized=precision == "int8"), path)
        feeds = {"a": np.random.default_rng(0).standard_normal((size, size), np.float32)}
        with closing(candidate.make(path).open()) as engine:
            engine.run(feeds)  # the first call allocates
            taken = _repeat(partial(engine.run, feeds), left / (len(sizes) - number))
        left, previous, expected = left - sum(taken), size, median(taken)
        rates = [CHAIN * 2 * size**3 / each for each in taken]
        library = f"{candidate.library}, {size}x{size}"
        found.append({"flops_per_second": median(rates), "samples": rates, "library": library})
    return found


def product_graph(size: int, *, quantized: bool) -> onnx.ModelProto:
    """A chain of products ``a @ w @ w ...`` of square matrices in fp32, with numbers that keep their magnitude.

    Args:
        size: Rows and columns.
        quantized: Whether factors are rounded to int8 as in the exporter's quantised graphs: activations with one
            scale, weights with one a column.
    """
    weights = np.random.default_rng(1).standard_normal((size, size), np.float32) / np.float32(size**0.5)
    constants: dict[str, Any] = {"scale": np.float32(6 / 127), "zero": np.int8(0)} if quantized else {}
    nodes, last = [], "a"
    for number in range(CHAIN):
        # Each product has weights of its own: ONNX Runtime 1.31 cannot load quantised ones that are shared.
        factor = f"w{number}"
        if quantized:
            scales = np.abs(weights).max(axis=0) / np.float32(127)
            stored = [f"{factor}_int8", f"{factor}_scale", f"{factor}_zero"]
            values = (np.rint(weights / scales).astype(np.int8), scales, np.zeros(size, np.int8))
            constants |= dict(zip(stored, values, strict=True))
            nodes.append(helper.make_node("DequantizeLinear", stored, [factor], axis=1))
            nodes.append(helper.make_node("QuantizeLinear", [last, "scale", "zero"], [f"q{number}"]))
            last = f"d{number}"
            nodes.append(helper.make_node("DequantizeLinear", [f"q{number}", "scale", "zero"], [last]))
        else:
            constants[factor] = weights
        nodes.append(helper.make_node("MatMul", [last, factor], [f"product{number}"]))
        last = f"product{number}"
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("a", last)]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _measure_copy(threads: int, seconds: float, copied: int | None) -> dict[str, Any]:
    """The ceiling's entry for memory; every thread copies a part of its own, since numpy releases the GIL."""
    length = (copied or max(_LEAST_COPIED, 4 * last_cache())) // 8 // threads
    if length < 1:
        raise InvalidRequestError(f"{copied} bytes are too few to copy with {threads} threads; give at least 8 each")
    # One copy before the timed ones, so that the system has mapped every page.
    parts = [(np.zeros(length), np.ones(length)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            for each in [pool.submit(np.copyto, target, source) for target, source in parts]:
                each.result()

        copy()
        taken = _repeat(copy, seconds)
    rates = [2 * 8 * length * threads / each for each in taken]
    return {"bytes_per_second": median(rates), "samples": rates}


def last_cache() -> int:
    """Bytes of all last-level caches together; 32 MiB where the system does not say."""
    sizes: dict[str, tuple[int, int]] = {}  # by the processors that share a cache: its level and size
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            found = int(level), int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
        sizes[shared] = max(sizes.get(shared, (0, 0)), found)
    top = max((level for level, _ in sizes.values()), default=0)
    return sum(size for level, size in sizes.values() if level == top) or 32 << 20


def _repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for as many calls as fit in ``seconds``, and at least three."""
    taken: list[float] = []
    while len(taken) < _FEWEST or sum(taken) < seconds:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return taken
