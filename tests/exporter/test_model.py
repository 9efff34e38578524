"""A new kind of adapter (``adapters/base.py``, ``adapters/registry.py``) goes through a model without an edit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.engines.trt import Range
from latentrt.exporter.adapters import registry
from latentrt.exporter.adapters.base import AdapterFiles, Option
from latentrt.exporter.adapters.controlnet import ControlNetFile, ControlNetFiles
from latentrt.exporter.adapters.ip_adapter import IpAdapterFiles
from latentrt.exporter.adapters.lora import LoraFiles
from latentrt.exporter.adapters.registry import ADAPTERS, open_model
from latentrt.exporter.adapters.safety_checker import SafetyCheckerFiles
from latentrt.exporter.adapters.tiny_vae import TinyVaeFiles
from latentrt.exporter.builder.build import build_bundle
from latentrt.exporter.builder.plans import profile_ranges
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.components import AdaptedCheckpoint, Adapter, Component
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.source import Source
from latentrt.runtime import Bundle
from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.cli import main
from latentrt.runtime.lora.reading import LoraFile


class Brightness(nn.Module):
    """Latents to their mean, ``[batch, 1, 1, 1]``, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Measure."""
        return latent_sample.mean(dim=(1, 2, 3), keepdim=True) * self.factor


@dataclass(frozen=True)
class Tint(Adapter):
    """Adds to the U-Net's last bias, records itself, and measures latents in a component of its own."""

    amount: float

    @property
    def fingerprint(self) -> str:
        """The amount."""
        return f"\0tint\0{self.amount!r}"

    @property
    def notes(self) -> tuple[str, ...]:
        """One assumption."""
        return ("assumed a tint",)

    @property
    def records(self) -> tuple[m.Adapter, ...]:
        """As a LoRA's."""
        return (m.Adapter("tint", hashlib.sha256(b"").hexdigest(), self.amount),)

    @property
    def fuses(self) -> tuple[str, ...]:
        """The U-Net."""
        return ("unet",)

    def fuse(self, part: str, module: nn.Module) -> None:
        """Add in place."""
        assert part == "unet"
        bias: Any = module.get_parameter("conv_out.bias")
        bias += self.amount

    @property
    def components(self) -> tuple[str, ...]:
        """The measure."""
        return ("brightness",)

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """The measure of as many channels as the VAE has."""
        channels = int(model.configs["vae"]["latent_channels"])
        example = {"latent_sample": torch.randn(2, channels, 8, 12, generator=generator)}
        axes = {"latent_sample": {0: "batch", 2: "latent_height", 3: "latent_width"}}
        return Component(name, Brightness(self.amount).eval(), example, axes, ("brightness",))

    def extend(self, component: Component, generator: torch.Generator) -> Component:
        """Keep the VAE's latents in fp32."""
        if component.name != "vae_decoder":
            return component
        return dataclasses.replace(component, keep_fp32=frozenset({"latent_sample"}))

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Those of the decoder."""
        return {"brightness": plain["vae_decoder"]}


@dataclass(frozen=True)
class TintFiles(AdapterFiles):
    """An amount in place of files."""

    title: ClassVar[str] = "a tint"
    options: ClassVar[tuple[Option, ...]] = (Option("--tint", "AMOUNT", "what is added to the prediction"),)
    amount: float

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """The amount."""
        given = values.get("tint", ())
        return cls(float(given[0])) if given else None

    def open(self, source: Source) -> Tint:
        """Nothing can be wrong."""
        return Tint(self.amount)


def test_a_new_adapter_goes_through_the_model(tiny: Any) -> None:
    """Fused weights, an extended component and a component of its own, with notes, records, ranges and fingerprint."""
    source = open_source(tiny.source("sd1"))
    plain, model = open_model(source), open_model(source, [TintFiles(0.25)])
    before, after = (each.load("unet").state_dict() for each in (plain, model))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["conv_out.bias"]
    torch.testing.assert_close(after["conv_out.bias"], before["conv_out.bias"] + 0.25)
    assert model.components == (*source.family.components, "brightness")
    assert model.all_components == (*plain.all_components, "brightness")
    own = model.load_component("brightness")
    assert own.module(torch.ones(1, 4, 2, 2)).item() == 0.25
    assert model.load_component("vae_decoder").keep_fp32 == {"latent_sample"}
    assert plain.load_component("vae_decoder").keep_fp32 == frozenset()
    assert model.notes == ("assumed a tint",)
    assert [record.name for record in model.records] == ["tint"]
    expected = hashlib.sha256(f"{source.fingerprint}\0tint\x000.25".encode()).hexdigest()
    assert (plain.fingerprint, model.fingerprint) == (source.fingerprint, expected)
    request = BuildRequest(Path("source"), Path("bundle"), ranges={"batch": Range(1, 2, 3)})
    ranges = profile_ranges(request, model)
    assert ranges["brightness"] == ranges["vae_decoder"]
    assert "brightness" not in profile_ranges(request, plain)


def test_weights_that_are_changed_are_loaded_in_fp32(tiny: Any) -> None:
    """Others keep the type that is asked for."""
    model = dataclasses.replace(open_model(open_source(tiny.source("sd1")), [TintFiles(1.0)]), dtype=torch.float16)
    assert {weight.dtype for weight in model.load("unet").parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.load("vae").parameters()} == {torch.float16}


@pytest.mark.heavy
def test_a_new_adapter_is_built_and_verified(
    tiny: Any, tmp_path: Path, shared_exports: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A caller of ``build_bundle`` gives it as it is; one entry in the table makes it an option of both commands."""
    with shared_exports.used():
        build_bundle(BuildRequest(tiny.source("sd1"), tmp_path / "bundle", adapters=[TintFiles(0.25)]))
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert "brightness" in manifest.components
    assert [adapter.scale for adapter in manifest.source.adapters] == [0.25]
    monkeypatch.setattr(registry, "ADAPTERS", (*ADAPTERS, TintFiles))
    monkeypatch.setattr("latentrt.exporter.cli.adapters.ADAPTERS", (*ADAPTERS, TintFiles))
    command = ["verify", str(tmp_path / "bundle"), "--source", str(tiny.source("sd1")), "--json"]
    assert main([*command, "--tint", "0.25"]) == 0
    assert "brightness/model.onnx" in capsys.readouterr().out
    assert main([*command, "--tint", "0.5"]) == 1
    assert main([*command, "--tint", "0.25", "--tint", "0.5"]) == 2
    assert "--tint is given 2 times; give it once" in capsys.readouterr().err


def test_adapters_are_put_on_in_the_order_of_the_table(tiny: Any, lora_files: Any, tmp_path: Path) -> None:
    """Whatever order they are given in, the fingerprint is that of bundles that were built before."""
    source, ip = open_source(tiny.source("sd1")), tiny.ip_adapter("sd1")
    style = lora_files.write(lora_files.peft(source), tmp_path / "style.safetensors")
    files = [
        TintFiles(1.0),
        SafetyCheckerFiles(tiny.safety_checker()),
        IpAdapterFiles(ip / "ip-adapter.safetensors", ip / "image_encoder"),
        ControlNetFiles((ControlNetFile("edges", tiny.controlnet("sd1")),)),
        TinyVaeFiles(tiny.tiny_vae()),
        LoraFiles((LoraFile(style, 0.5), LoraFile(style, -1.0))),
    ]
    model = open_model(source, files)
    assert [type(adapter).__name__ for adapter in model.adapters] == [
        *("Loras", "TinyVae", "ControlNets", "IpAdapter", "SafetyChecker", "Tint")
    ]
    sha256 = model.records[0].sha256
    assert model.adapters[0].fingerprint == f"\0{sha256}\x000.5\0{sha256}\0-1.0"
    for adapter, mark in zip(
        model.adapters[1:5], ("", "controlnet\0", "ip-adapter\0", "safety-checker\0"), strict=True
    ):
        digest = adapter.fingerprint.removeprefix(f"\0{mark}")
        assert len(digest) == 64
    assert open_model(source, files[::-1]).fingerprint == model.fingerprint
    assert model.twins == ("unet_control",)
    assert model.with_stages("unet")[-2:] == ("unet_control", "unet_control_step")
    assert model.with_stages("controlnet_edges_image") == ("controlnet_edges_image",)
    with pytest.raises(InvalidRequestError, match="a tint is given in two ways"):
        open_model(source, [TintFiles(1.0), TintFiles(2.0)])


def test_fields_of_a_request_are_files_of_adapters() -> None:
    """The five fields that name a kind, then all others."""
    here = Path("here")
    ip, net, lora = IpAdapterFiles(here, here), ControlNetFile("edges", here), LoraFile(here)
    named: dict[str, Any] = {"loras": [lora], "tiny_vae": here, "controlnets": [net], "ip_adapter": ip}
    request = BuildRequest(here, here, **named, safety_checker=here, adapters=[TintFiles(1.0)])
    assert request.adapter_files == (
        LoraFiles((lora,)),
        TinyVaeFiles(here),
        ControlNetFiles((net,)),
        ip,
        SafetyCheckerFiles(here),
        TintFiles(1.0),
    )
    assert BuildRequest(here, here).adapter_files == ()


def test_an_adapter_does_nothing_that_it_does_not_say(tiny: Any) -> None:
    """Without a method of its own it leaves the model as it is, and is not asked for what it does not have."""

    class Nothing(Adapter):
        @property
        def fingerprint(self) -> str:
            return "\0nothing"

    source = open_source(tiny.source("sd1"))
    plain = open_model(source)
    model = dataclasses.replace(plain, adapters=(Nothing(),))
    assert model.all_components == plain.all_components
    assert (model.notes, model.records, model.twins) == ((), (), ())
    assert model.fingerprint != plain.fingerprint
    (adapter,) = model.adapters
    for wrong in (
        lambda: adapter.component(model, "brightness", torch.Generator()),
        lambda: adapter.fuse("unet", nn.Identity()),
        lambda: model.load_component("brightness"),
    ):
        with pytest.raises(SourceError):
            wrong()
