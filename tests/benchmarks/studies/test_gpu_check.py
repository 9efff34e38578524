"""``gpu_check`` with ``outcome``, ``subject``, ``pipeline_checks`` and ``plan_checks``, with and without faults."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.benchmarks.studies import gpu_check
from latentrt.benchmarks.studies.gpu import plan_checks, subject
from latentrt.benchmarks.studies.gpu.outcome import psnr
from latentrt.benchmarks.studies.gpu_check import main
from latentrt.engines.trt import session

ENGINE = "tensorrt-rtx"


@pytest.mark.parametrize("flag", ["--steps", "--rounds"])
def test_nothing_to_do_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero steps or rounds are an error of the command line."""
    with pytest.raises(SystemExit, match="2"):
        main(["bundle", flag, "0"])
    assert "expected 1 or more" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It says in one sentence that there is none."""
    monkeypatch.setattr(gpu_check, "cuda_devices", lambda: ())
    assert main(["bundle"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "gpu_check needs an NVIDIA GPU and its driver, and no CUDA device was found here\n"


@pytest.mark.parametrize(("error", "value"), [(0.0, np.inf), (0.1, 20.0), (np.nan, -np.inf)])
def test_psnr(error: float, value: float) -> None:
    """Equal arrays are infinitely good, NaN is infinitely bad."""
    reference = np.ones(5, np.float32)
    assert psnr(reference, reference - np.float32(error)) == pytest.approx(value, abs=1e-5)


class Machine:
    """A bundle with plans, on a make-believe GPU."""

    def __init__(self, fake_gpu: Any, bundle: Path) -> None:
        self.bundle = bundle
        self.cuda = fake_gpu.FakeCuda()
        self.module = fake_gpu.make_sdk(self.cuda, ENGINE)
        fake_gpu.add_plans(bundle, self.module, ENGINE)
        self.fake_gpu = fake_gpu

    def build(self, sdk: Any, graph: Path, output: Path, profile: Any, *, options: Any) -> None:
        """In place of a build: a plan that computes with ONNX Runtime."""
        model = onnx.load(graph)
        values = [onnx.numpy_helper.to_array(w, str(graph.parent)) for w in model.graph.initializer]
        weights = {w.name: v for w, v in zip(model.graph.initializer, values, strict=True) if v.dtype == np.float32}
        content = f"{options} of {graph}".encode()
        self.module.plans[content] = self.fake_gpu.onnx_plan(graph, weights=weights if options.refittable else None)
        output.write_bytes(content)

    def plan(self, component: str) -> Any:
        return next(
            plan for content, plan in self.module.plans.items() if content.startswith(f"plan of {component} ".encode())
        )


@pytest.fixture
def machine(
    fake_gpu: Any, tiny_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """The tiny model with plans on a make-believe GPU."""
    made = Machine(fake_gpu, Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "sd1")))
    monkeypatch.setattr(plan_checks, "build_plan", made.build)
    with fake_gpu.installed(monkeypatch, made.module, made.cuda, ENGINE):
        for name in ("cuda_devices", "load_cuda", "load_sdk"):
            for module in (gpu_check, plan_checks, subject):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(session, name))
        yield made
    gc.collect()
    assert made.cuda.leaks == {}


def report_of(machine: Machine, tmp_path: Path, status: int) -> dict[str, Any]:
    file = tmp_path / "report.json"
    assert main([str(machine.bundle), "--steps", "1", "--rounds", "1", "--json", str(file)]) == status
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.heavy
def test_all_is_well(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every check passes, the table has a line for each, and the report has machine, date and samples."""
    report = report_of(machine, tmp_path, 0)
    assert {check["status"] for check in report["checks"]} == {"pass"}, report["checks"]
    names = [check["name"] for check in report["checks"]]
    components = ("text_encoder", "unet_prompt", "unet_schedule", "unet_step", "vae_decoder")
    assert names[:5] == [f"component {name}" for name in components]
    assert len(names) == 15
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert out.endswith("15 pass, 0 fail, 0 skipped\n")
    assert report["machine"]["gpu"] == "H100"
    assert report["machine"]["sdk"] == "TensorRT-RTX 10.99.1"
    assert {"date", "tools", "arguments", "seconds"} <= report.keys()
    latency = next(check for check in report["checks"] if check["name"] == "latency")
    assert len(latency["samples"]["unet_step"]) == 1
    assert len(latency["samples"]["request"]) == 1


def _wrong_values(machine: Machine) -> None:
    plan = machine.plan("vae_decoder")
    compute = plan.compute
    plan.compute = lambda feeds, weights: {name: each + 0.3 for name, each in compute(feeds, weights).items()}


def _no_graphs(machine: Machine) -> None:
    machine.module.capturable = False


def _refit_does_nothing(machine: Machine) -> None:
    machine.module.Refitter.refit_cuda_engine = lambda refitter: True


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("spoil", "failing", "words"),
    [
        (_wrong_values, {"component vae_decoder", "pictures"}, "dB against ONNX Runtime"),
        (_no_graphs, {"CUDA graphs"}, "no graph was replayed"),
        (_refit_does_nothing, {"refit"}, "other weights changed nothing"),
    ],
)
def test_what_is_wrong_is_found(
    machine: Machine, tmp_path: Path, spoil: Callable[[Machine], None], failing: set[str], words: str
) -> None:
    """A fault fails its check and no other, and the exit status is 1."""
    spoil(machine)
    report = report_of(machine, tmp_path, 1)
    failed = {check["name"]: check["detail"] for check in report["checks"] if check["status"] == "fail"}
    assert failed.keys() == failing
    assert all(words in detail for detail in failed.values())
