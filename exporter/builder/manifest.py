"""The manifest of a bundle, made in one place for graphs that are exported and for graphs that are taken over."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.bundle import manifest as m

from ..model import Model
from ..source.source import Source

EXPORT_TOOLS = ("latentrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
"""Packages whose versions decide what an export gives."""


def tool_versions(tools: Sequence[str] = EXPORT_TOOLS) -> dict[str, str]:
    """Versions of Python and of installed packages, by name."""
    return {"python": platform.python_version(), **{tool: importlib.metadata.version(tool) for tool in tools}}


@dataclass(frozen=True)
class ManifestFactory:
    """Makes manifests of a model: all entries but those of its graphs, tokenizers and figures are the same.

    Attributes:
        model: The model.
        defaults: Options of a request that names none.
        tools: Versions of the packages that made the graphs.
    """

    model: Model
    defaults: m.Defaults
    tools: Mapping[str, str]

    @property
    def origin(self) -> m.Source:
        """The source with its fingerprint, and the files that are fused into its weights."""
        source = self.model.source
        return m.Source(source.name, source.licence, self.model.fingerprint, self.model.records)

    def describes(self, manifest: m.Manifest) -> bool:
        """Whether a manifest says the same of source, defaults and settings; tools are not compared."""
        return (
            manifest.defaults == self.defaults
            and manifest.source == self.origin
            and manifest.settings == self.model.family.settings(self.model)
        )

    def make(
        self,
        components: Mapping[str, m.Component],
        tokenizers: Mapping[str, m.Tokenizer],
        quality: Mapping[str, float] | None = None,
    ) -> m.Manifest:
        """The manifest of a bundle, without its list of files, which is made when the bundle is committed.

        Args:
            components: Components with their graphs, by name.
            tokenizers: Tokenizers that the bundle holds, by name.
            quality: Figures of the graphs, see :class:`latentrt.runtime.bundle.manifest.Manifest`.
        """
        source, family = self.model.source, self.model.family
        return m.Manifest(
            format_version=m.FORMAT_VERSION,
            family=family.name,
            prediction_type=str(source.scheduler.get("prediction_type", family.prediction)),
            components=components,
            files={},
            latent=family.latent(source),
            tokenizers=tokenizers,
            scheduler=source.scheduler,
            defaults=self.defaults,
            source=self.origin,
            tools=self.tools,
            quality=quality or {},
            settings=family.settings(source),
        )


def write_tokenizers(source: Source, directory: Path) -> dict[str, m.Tokenizer]:
    """Write a source's tokenizers into a bundle under construction, each in a folder of its name.

    Returns:
        Their entries for the manifest, by name.

    Raises:
        SourceError: if one is damaged, or its text encoder does not know all of its tokens.
    """
    written = {}
    for name, part in source.family.tokenizers.items():
        tokenizer = source.load_tokenizer(name)
        (directory / name).mkdir(exist_ok=True)
        # The tokenizer's own method to save reports a full disk as a bare Exception.
        text = tokenizer.backend_tokenizer.to_str()
        (directory / name / m.TOKENIZER_FILE).write_text(text, encoding="utf-8")
        positions = int(source.configs[part.encoder].get("max_position_embeddings", 77))
        length = part.length or min(positions, int(tokenizer.model_max_length))
        written[name] = m.Tokenizer(name, length, int(tokenizer.pad_token_id), part.kind)
    return written
