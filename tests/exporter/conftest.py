"""What the exporter's tests share: damage for sources, and exports that take no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.exporter.builder import construction
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.targets import Form
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle

EditJson = Callable[..., None]


@pytest.fixture
def edit_json() -> EditJson:
    """A function that changes entries of a JSON file; ``...`` removes one."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text())
        content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def copied_exports(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exports copy the graph of the tiny SD 1.x bundle, whatever they are given; lists what was exported."""
    exported: list[str] = []
    bundle = Bundle.open(tiny_bundles["sd1"])

    def copy(component: Component, form: Form, directory: Path) -> Graph:
        known = bundle.graph(component.name, "opset20-fp32")
        file = f"{component.name}/model{form.suffix}.onnx"
        (directory / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(bundle.file(known.file), directory / file)
        for external in known.external:
            shutil.copyfile(bundle.file(external), directory / external)
        exported.append(f"{component.name} {form.name}")
        return Graph(file, form.precision, known.opset, known.inputs, known.outputs, known.external)

    monkeypatch.setattr(construction, "export_component", copy)
    return exported
