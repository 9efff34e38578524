"""The manifest says of a model what its configurations say, and names the tools that made the graphs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from latentrt.exporter.builder.manifest import EXPORT_TOOLS, ManifestFactory, tool_versions, write_tokenizers
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.runtime.bundle import manifest as m

DEFAULTS = m.Defaults("ddim", 20, 7.5, 64, 32, clip_skip=0)


def test_tools_are_the_installed_packages() -> None:
    """Each package stands with its version, and Python with its own."""
    versions = tool_versions()
    assert set(versions) == {"python", *EXPORT_TOOLS}
    assert versions.pop("python") == platform.python_version()
    assert all(version == importlib.metadata.version(name) for name, version in versions.items())


@pytest.mark.parametrize(("kind", "prediction"), [("sd1", "epsilon"), ("sd2", "v_prediction")])
def test_a_manifest_is_that_of_its_model(tiny: Any, kind: str, prediction: str) -> None:
    """Family, latents, scheduler and prediction are the source's; what is given to the factory stands as given."""
    source = open_source(tiny.source(kind))
    made = ManifestFactory(Model(source), DEFAULTS, {"torch": "2"}).make({}, {}, {"a.onnx": 90.0})
    vae = source.configs["vae"]
    assert (made.family, made.prediction_type) == (source.family.name, prediction)
    assert made.latent.channels == vae["latent_channels"]
    assert made.latent.scaling == vae["scaling_factor"]
    assert made.latent.vae_scale_factor == 2 ** (len(vae["block_out_channels"]) - 1)
    assert (made.scheduler, made.source.fingerprint) == (source.scheduler, source.fingerprint)
    assert (made.defaults, made.tools, made.quality) == (DEFAULTS, {"torch": "2"}, {"a.onnx": 90.0})
    assert (made.format_version, made.files) == (m.FORMAT_VERSION, {})


def test_a_manifest_of_another_build(tiny: Any) -> None:
    """Other defaults, another source or other settings make another manifest; other tools do not."""
    model = Model(open_source(tiny.source("sd1")))
    factory = ManifestFactory(model, DEFAULTS, {"torch": "2"})
    made = factory.make({}, {})
    assert factory.describes(made)
    assert dataclasses.replace(factory, tools={"torch": "3"}).describes(made)
    assert not dataclasses.replace(factory, defaults=dataclasses.replace(DEFAULTS, steps=21)).describes(made)
    assert not factory.describes(dataclasses.replace(made, settings={"guidance": "embedded"}))
    assert not dataclasses.replace(factory, model=Model(open_source(tiny.source("sd2")))).describes(made)


def test_tokenizers_in_a_bundle_encode_as_the_source_does(tiny_source: Path, tmp_path: Path) -> None:
    """The file that is written gives the ids that transformers gives, with the length and padding of the entry."""
    written = write_tokenizers(open_source(tiny_source), tmp_path)
    entry = written["tokenizer"]
    theirs = CLIPTokenizer.from_pretrained(tiny_source / "tokenizer")
    ours = Tokenizer.from_file(str(tmp_path / entry.directory / m.TOKENIZER_FILE))
    for prompt in ("", "a photo of a cat", "Ünï çödé, 42!"):
        assert ours.encode(prompt).ids == theirs(prompt).input_ids
    assert (entry.max_length, entry.pad_token_id, entry.kind) == (77, theirs.pad_token_id, "clip")
