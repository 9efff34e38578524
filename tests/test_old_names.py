"""Old import paths that the manual named keep working, as modules that re-export from their new place."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest

NAMES = {
    "latentrt.engines.ov": "latentrt.engines.openvino.engine",
    "latentrt.exporter.build": "latentrt.exporter.builder.build",
    "latentrt.exporter.emulate": "latentrt.exporter.verification.emulate",
    "latentrt.exporter.quality": "latentrt.exporter.precision.quality",
    "latentrt.exporter.targets": "latentrt.exporter.graphs.targets",
    "latentrt.runtime.engine_choice": "latentrt.runtime.components.engine_choice",
    "latentrt.runtime.noise": "latentrt.runtime.samplers.noise",
    "latentrt.runtime.request_file": "latentrt.runtime.inputs.request_file",
    "latentrt.runtime.tiling": "latentrt.runtime.vae.tiling",
}
USED = {
    "latentrt.engines.ov": ["OpenVinoEngine", "OpenVinoOptions"],
    "latentrt.exporter.build": ["BuildRequest", "build_bundle"],
    "latentrt.exporter.emulate": ["emulated"],
    "latentrt.exporter.quality": ["picture_psnr", "picture_ssim"],
    "latentrt.exporter.targets": ["PORTABLE"],
    "latentrt.runtime.engine_choice": ["ENGINES", "EngineSettings", "make_engine"],
    "latentrt.runtime.noise": ["TorchGenerator", "torch_randn"],
    "latentrt.runtime.request_file": ["KEYWORD", "read_png", "record"],
    "latentrt.runtime.tiling": ["encode_tiles"],
    "latentrt.runtime.bundle": ["Bundle"],
    "latentrt.runtime.images": ["GenerationParameters", "read_parameters", "sheet", "write_png"],
}
PROGRAMS = {
    "against_torch": "studies.against_torch",
    "build_sd15_unet": "studies.build_sd15_unet",
    "checkpoint": "checkpoints.write",
    "gpu_check": "studies.gpu_check",
    "host_time": "studies.host_time",
    "loadgen": "mlperf.loadgen",
    "lora_switch": "studies.lora_switch",
    "step_time": "studies.step_time",
    "winograd": "studies.winograd",
}


@pytest.mark.parametrize(("module", "names"), USED.items(), ids=USED)
def test_names_that_the_manual_used_are_there(module: str, names: list[str]) -> None:
    """Each is the very object of its new place, where that has it under the same name."""
    old = importlib.import_module(module)
    new = importlib.import_module(NAMES[module]) if module in NAMES else None
    for name in names:
        assert getattr(old, name) is not None
        if new is not None and hasattr(new, name):
            assert getattr(old, name) is getattr(new, name)


@pytest.mark.parametrize(("name", "module"), PROGRAMS.items(), ids=PROGRAMS)
def test_programs_start_under_their_old_names(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the same function, ``python -m`` runs it, and its help names the new module."""
    old, new = f"latentrt.benchmarks.{name}", f"latentrt.benchmarks.{module}"
    assert importlib.import_module(old).main is importlib.import_module(new).main
    monkeypatch.setattr("sys.argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, old)  # as in a process of its own
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(old, run_name="__main__")
    assert capsys.readouterr().out.split()[:4] == ["usage:", "python", "-m", new]
