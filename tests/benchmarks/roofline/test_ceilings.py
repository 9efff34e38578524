"""The machine's ceilings, measured with products and copies that take no time."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.benchmarks.roofline import ceilings
from latentrt.benchmarks.roofline.ceilings import (
    CHAIN,
    PRECISIONS,
    last_cache,
    measure_ceilings,
    physical_cores,
    product_graph,
)
from latentrt.benchmarks.roofline.counting import Work, count_model
from latentrt.benchmarks.roofline.placing import place
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.engines.openvino import engine as ov

SMALL: dict[str, Any] = {"seconds": 0.02, "sizes": (64, 96), "copied": 1 << 20}


def test_every_ceiling_is_the_median_of_its_samples() -> None:
    """Each precision has its best library or the reason why there is none; rates are such as a processor has."""
    found = measure_ceilings(1, **SMALL)
    assert found["threads"] == 1
    assert tuple(found["matmul"]) == PRECISIONS
    measured = [each for each in found["matmul"].values() if "unavailable" not in each]
    assert found["matmul"]["fp32"] in measured
    assert found["matmul"]["int8"] in measured
    for each in measured:
        assert set(each) == {"flops_per_second", "samples", "library"}
        assert len(each["samples"]) >= 3
        assert each["flops_per_second"] == median(each["samples"])
        assert 1e6 < each["flops_per_second"] < 1e14
        assert each["library"].startswith(("ONNX Runtime ", "OpenVINO "))
        assert each["library"].endswith(("64x64", "96x96"))
    assert found["copy"]["bytes_per_second"] == median(found["copy"]["samples"])
    assert 1e7 < found["copy"]["bytes_per_second"] < 1e13
    assert place(Work(10**9, 10**6, {}, 0), 1.0, found, "fp32").percent > 0


@pytest.mark.parametrize("library", ["ONNX Runtime", "OpenVINO"])
def test_bf16_is_refused_where_it_would_be_fp32(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no instructions for it, the reason stands in place of a ceiling."""
    monkeypatch.setattr(ov, "has_bf16", lambda _: False)
    reason = measure_ceilings(1, **SMALL)["matmul"]["bf16"]["unavailable"]
    assert {"ONNX Runtime": "has no bf16 arithmetic", "OpenVINO": "has no instructions for bf16"}[library] in reason


def test_one_library_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenVINO, ONNX Runtime sets the ceilings of what it computes in."""

    def missing() -> None:
        raise EngineUnavailableError("OpenVINO is not installed")

    monkeypatch.setattr(ov, "load_core", missing)
    found = measure_ceilings(1, **SMALL)["matmul"]
    assert found["fp32"]["library"].startswith("ONNX Runtime")
    assert found["int8"]["library"].startswith("ONNX Runtime")
    assert found["bf16"]["unavailable"].endswith("OpenVINO is not installed")


def test_sizes_that_take_too_long_are_left_out(tmp_path: Path) -> None:
    """The first is measured at least three times whatever it takes; one that would not fit the time is not begun."""
    (candidate, *_), _ = ceilings._candidates("fp32", 1)
    found = ceilings._measure_matmul(candidate, "fp32", (64, 1 << 20), 1e-9, tmp_path)
    assert [each["library"].rpartition(", ")[2] for each in found] == ["64x64"]
    assert len(found[0]["samples"]) == 3


@pytest.mark.parametrize("quantized", [False, True])
def test_the_chain_multiplies_matrices(quantized: bool, tmp_path: Path) -> None:
    """It computes what numpy computes, rounded where it is quantised, and has as many operations as it is timed for."""
    graph = product_graph(48, quantized=quantized)
    onnx.save(graph, tmp_path / "graph.onnx")
    start = np.random.default_rng(2).standard_normal((48, 48), np.float32)
    with OnnxRuntimeEngine(tmp_path / "graph.onnx").open() as engine:
        (result,) = engine.run({"a": start}).values()
    weights = np.random.default_rng(1).standard_normal((48, 48), np.float32) / np.float32(48**0.5)
    expected = start @ np.linalg.matrix_power(weights, CHAIN)
    difference = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    assert difference < (0.1 if quantized else 1e-5)
    assert (difference > 1e-3) is quantized
    assert count_model(graph, {"a": [48, 48]}).products == CHAIN * 2 * 48**3


def test_the_copy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread copies its part, and a rate counts each byte twice."""
    copied: list[int] = []

    def copyto(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        target[:] = source
        copied.append(target.nbytes)

    monkeypatch.setattr(np, "copyto", copyto)
    monkeypatch.setattr(ceilings, "_repeat", lambda work, _: [(work(), 0.5)[1]] * 3)
    assert ceilings._measure_copy(4, 1.0, 4 << 20)["samples"] == [2 * (4 << 20) / 0.5] * 3
    assert copied == [1 << 20] * 8  # four parts, once to begin with and once timed


def test_what_the_system_says_of_the_processor() -> None:
    """There is a core, and no more than there are processors; the last cache is no smaller than the C library says."""
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    known = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    assert last_cache() >= max(known, 1 << 18)


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0.0}, {"sizes": ()}, {"sizes": (0,)}, {"sizes": (64, 32)}, {"copied": 7}, {"threads": -1}],
    ids=str,
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    """No time, no size, sizes that descend, less than a number to copy, and fewer threads than none."""
    arguments = {"threads": 1, **SMALL, "sizes": (8,), **wrong}
    with pytest.raises(InvalidRequestError):
        measure_ceilings(**arguments)
