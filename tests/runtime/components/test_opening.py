"""Opening a bundle's engines, and those that are ``opened`` when a request needs them: all, or none stays open."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines import Engine, FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, EngineClosedError, EngineUnavailableError
from latentrt.runtime import Bundle
from latentrt.runtime.components import opening
from latentrt.runtime.components.engine_choice import EngineSettings
from latentrt.runtime.components.opened import OpenedEngines
from latentrt.runtime.components.opening import components_for, embedding_widths, open_engines
from latentrt.runtime.families import family_of


@pytest.fixture(scope="module")
def bundle(tiny_bundles: dict[str, Path]) -> Bundle:
    return Bundle.open(tiny_bundles["sd1"])


def fake() -> FakeEngine:
    spec = TensorSpec("x", "float32", ("n",))
    return FakeEngine([spec], [spec], dict)


def test_components_of_a_loop(bundle: Bundle) -> None:
    """The fused loop opens the denoiser's stages, the plain one the whole denoiser."""
    stages = ("unet_prompt", "unet_schedule", "unet_step")
    assert components_for(bundle) == components_for(bundle, "fused")
    assert set(components_for(bundle)) == {"text_encoder", *stages, "vae_decoder", "vae_decoder_tiny"} & {
        *bundle.manifest.components
    }
    assert set(components_for(bundle, "plain")) == set(components_for(bundle)) - {*stages} | {"unet"}


def test_engines_come_opened(bundle: Bundle) -> None:
    """One engine a component, each of which takes feeds; text encoders say how wide an embedding is."""
    engines = open_engines(bundle, components_for(bundle), EngineSettings("onnxruntime", threads=1), None)
    try:
        assert list(engines) == list(components_for(bundle))
        assert all(engine.inputs and engine.outputs for engine in engines.values())
        assert embedding_widths(engines, family_of(bundle.manifest)).keys() <= {"text_encoder"}
    finally:
        for engine in engines.values():
            engine.close()


def test_where_one_does_not_open_none_stays_open(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were opened before it are closed again."""
    made: dict[str, FakeEngine] = {name: fake() for name in ("text_encoder", "unet", "vae_decoder")}

    def broken() -> Engine:
        raise EngineUnavailableError("out of luck")

    monkeypatch.setattr(made["vae_decoder"], "open", broken)
    monkeypatch.setattr(opening, "make_engine", lambda bundle, component, settings: made[component])
    with pytest.raises(EngineUnavailableError, match="out of luck"):
        open_engines(bundle, list(made), EngineSettings("onnxruntime"), None)
    for name in ("text_encoder", "unet"):
        with pytest.raises(EngineClosedError):
            made[name].run({"x": np.zeros(1, np.float32)})


def test_a_component_is_opened_when_it_is_first_needed() -> None:
    """Once, whoever asks for it at the same time; one that the bundle lacks is refused by name."""
    opened: list[str] = []

    def opener(component: str) -> Engine:
        opened.append(component)
        threading.Event().wait(0.01)
        return fake().open()

    first = fake().open()
    engines = OpenedEngines({"unet": first}, ("unet", "vae_encoder"), opener, threading.Event())
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: id(engines("vae_encoder")), range(8)))
    assert opened == ["vae_encoder"]
    assert found == {id(engines("vae_encoder"))}
    assert engines("unet") is first
    with pytest.raises(BundleError, match="image_encoder is needed, and the pipeline has no engine"):
        engines("image_encoder")
    with pytest.raises(BundleError, match="vae_encoder is needed"):
        OpenedEngines({}, ("vae_encoder",), None, threading.Event())("vae_encoder")


def test_nothing_is_opened_after_closing() -> None:
    """Every engine is closed, and the next that is needed is refused, in all that share the event."""
    closed, first = threading.Event(), fake().open()
    engines = OpenedEngines({"unet": first}, ("unet", "vae_encoder"), lambda _: fake().open(), closed)
    others = OpenedEngines({}, ("vae_encoder",), lambda _: fake().open(), closed)
    engines.close()
    for each in (engines, others):
        with pytest.raises(EngineClosedError, match="the pipeline is closed"):
            each("vae_encoder")
    with pytest.raises(EngineClosedError):
        first.run({"x": np.zeros(1, np.float32)})
