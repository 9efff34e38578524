"""An IP-Adapter: a picture as part of the prompt.

Ye et al. 2023 (arXiv 2308.06721): a CLIP image encoder and a projection turn a picture into a few tokens. Every
cross-attention of the U-Net attends to them beside the text, with keys and values of its own; the results are added.
The values carry the scale, so it belongs to what is computed once a request, and is a request's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.bundle.manifest import IMAGE_ENCODER

from ..components import Component
from ..families.checks import natural
from ..source.description import check_bounds
from ..source.optimum import GraphFolders
from ..source.weights import assign, empty_module, opened, read_json, read_tensors, read_weights, weight_files
from .clip_vision import STEM, USUAL_SIDE, check_vision, empty_vision, load_vision

if TYPE_CHECKING:
    from ..source.source import Source

TOKENS = 4
"""Tokens that a picture becomes, as in the adapters of the paper's first kind."""

_CLASS = "CLIPVisionModelWithProjection"
_PROJECTION = {"proj.weight": "image_embeds.weight", "proj.bias": "image_embeds.bias"}


@dataclass(frozen=True)
class IpAdapterFiles:
    """An IP-Adapter to build in.

    Attributes:
        adapter: A safetensors file.
        encoder: A directory of the CLIP image encoder that it was made with.
    """

    adapter: Path
    encoder: Path

    @classmethod
    def given(cls, adapter: Path | None, encoder: Path | None) -> IpAdapterFiles | None:
        """Both or neither.

        Raises:
            InvalidRequestError: if there is one alone.
        """
        if adapter is None and encoder is None:
            return None
        if adapter is None or encoder is None:
            raise InvalidRequestError(
                "an IP-Adapter goes with its image encoder; give --ip-adapter and --image-encoder"
            )
        return cls(adapter, encoder)


class ImagePrompt(nn.Module):
    """A picture ``[batch, 3, side, side]``, normalised, to tokens ``[batch, 4, width]``, and those of no picture."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.projection: Any = projection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode."""
        embedded = self.encoder(pixel_values).image_embeds
        return self.projection(embedded), self.projection(torch.zeros_like(embedded))


class DecoupledAttention:
    """Cross-attention to a text and, with keys and values of its own, to a picture; diffusers calls it a processor."""

    def __init__(self, keys: nn.Module, values: nn.Module) -> None:
        self.keys, self.values = keys, values

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor, Tensor], **_: Any
    ) -> Tensor:
        """Attend: ``[rows, places, width]``, and states of text, tokens of a picture and their scale ``[rows]``."""
        text, tokens, scale = encoder_hidden_states

        def heads(states: Tensor) -> Tensor:
            split: Tensor = torch.unflatten(states, -1, (attn.heads, -1))
            return split.transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        values = self.values(tokens)
        values = values * scale.to(values.dtype)[:, None, None]
        read = scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        seen = scaled_dot_product_attention(query, heads(self.keys(tokens)), heads(values))
        result: Tensor = attn.to_out[1](attn.to_out[0]((read + seen).transpose(1, 2).flatten(2)))
        return result


class PicturedDenoiser(nn.Module):
    """A U-Net that is told a picture behind the text: tokens ``[batch, 4, width]`` and their scale ``[batch]``.

    Args:
        denoiser: What is exported without an adapter; its weights keep their names.
        layers: By name of a cross-attention's processor, the layers for keys and values.
    """

    def __init__(self, denoiser: nn.Module, layers: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.unet: Any = denoiser.unet
        self.layers = nn.ModuleList(layer for pair in layers.values() for layer in pair)
        self._denoiser: Any = [denoiser]  # in a list it is no part of its own
        own = {name: DecoupledAttention(*pair) for name, pair in layers.items()}
        unet: Any = self.unet
        unet.set_attn_processor({**unet.attn_processors, **own})

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image_tokens: Tensor,
        image_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict."""
        rest = () if text_embeds is None else (text_embeds, time_ids)
        states = (encoder_hidden_states, image_tokens, image_scale)
        prediction: Tensor = self._denoiser[0](sample, timestep, states, *rest)
        return prediction


@dataclass(frozen=True)
class IpAdapter:
    """A checked IP-Adapter of a source.

    Attributes:
        files: Where it is.
        config: Of the image encoder.
        widths: By number of a cross-attention's tensors in the file, the width of its keys and values.
        fingerprint: SHA-256 over all files.
    """

    files: IpAdapterFiles
    config: Mapping[str, Any] = field(repr=False)
    widths: Mapping[int, int] = field(repr=False)
    fingerprint: str

    @classmethod
    def open(cls, files: IpAdapterFiles, source: Source) -> IpAdapter:
        """Check both.

        Raises:
            SourceError: if one is missing, damaged, of a kind that is not supported, or for another model.
        """
        config = _encoder_config(files.encoder)
        name = files.adapter.name
        if not files.adapter.is_file():
            state = "is no file" if files.adapter.exists() else "does not exist"
            raise SourceError(f"the IP-Adapter {str(files.adapter)!r} {state}")
        if files.adapter.suffix != ".safetensors":
            raise SourceError(f"{name} does not end with .safetensors; other files of weights can run code when loaded")
        with opened(files.adapter, name) as content:
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
        if not any(key.startswith("image_proj.") for key in shapes):
            raise SourceError(f"{name} is no IP-Adapter: it has no tensors of an image projection")
        if "image_proj.proj.weight" not in shapes or any("lora" in key for key in shapes):
            raise SourceError(f"{name} is an IP-Adapter of another kind (Plus, full face or FaceID), not supported yet")
        unet = source.configs[source.family.denoiser]
        width = natural("unet", unet, "cross_attention_dim", 1280)
        embedded = natural(files.encoder.name, config, "projection_dim", 512)
        expected = {
            "image_proj.proj.weight": (TOKENS * width, embedded),
            "image_proj.proj.bias": (TOKENS * width,),
            "image_proj.norm.weight": (width,),
            "image_proj.norm.bias": (width,),
        }
        skeleton: Any = empty_module(source.family.parts[source.family.denoiser].build, unet, source.family.denoiser)
        widths = dict(zip(range(1, 10**6, 2), _widths(skeleton).values(), strict=False))
        for number, own in widths.items():
            expected |= {f"ip_adapter.{number}.{layer}.weight": (own, width) for layer in ("to_k_ip", "to_v_ip")}
        for key, shape in expected.items():
            if shapes.get(key) != shape:
                found = f"has the shape {list(shapes[key])}" if key in shapes else "is missing"
                raise SourceError(
                    f"{name}: {key!r} {found}, expected {list(shape)}; it is for another model than {source.name}, or "
                    f"for another image encoder than {files.encoder.name}"
                )
        if unknown := sorted(shapes.keys() - expected.keys()):
            raise SourceError(f"{name}: the tensor {unknown[0]!r} has no place in {source.name}")
        digest = hashlib.sha256()
        for file in (files.adapter, files.encoder / "config.json", *weight_files(files.encoder, STEM)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return cls(files, config, widths, digest.hexdigest())

    def _tensors(self) -> dict[str, Tensor]:
        name = self.files.adapter.name
        with opened(self.files.adapter, name) as content:
            return dict(read_tensors(content, content.keys(), name))

    def encoder(self, generator: torch.Generator) -> Component:
        """The image encoder and the projection, to be exported.

        Raises:
            SourceError: if it cannot be built.
        """
        name = self.files.encoder.name
        model = load_vision(name, self.config, read_weights(self.files.encoder, STEM))
        own = {key.removeprefix("image_proj."): each for key, each in self._tensors().items()}
        own = {_PROJECTION.get(key, key): each for key, each in own.items() if not key.startswith("ip_adapter.")}
        rows, width = own["image_embeds.weight"].shape
        projection = ImageProjection(width, rows // TOKENS, TOKENS)
        assign(projection, own, self.files.adapter.name)
        side = int(self.config.get("image_size", USUAL_SIDE))
        pixels = torch.randn(2, 3, side, side, generator=generator)
        module = ImagePrompt(model, projection).eval().requires_grad_(False)
        outputs = ("image_tokens", "no_image_tokens")
        return Component(IMAGE_ENCODER, module, {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, outputs)

    def extended(self, plain: Component, generator: torch.Generator) -> Component:
        """A denoiser that takes a picture's tokens and their scale too.

        Raises:
            SourceError: if it cannot be built.
        """
        module: Any = plain.module
        tensors, layers = self._tensors(), {}
        width = plain.example["encoder_hidden_states"].shape[-1]
        for number, processor in zip(self.widths, _widths(module.unet), strict=True):
            pair = []
            for layer in ("to_k_ip", "to_v_ip"):
                linear = nn.Linear(width, self.widths[number], bias=False, device="meta")
                assign(linear, {"weight": tensors[f"ip_adapter.{number}.{layer}.weight"]}, self.files.adapter.name)
                pair.append(linear)
            layers[processor] = (pair[0], pair[1])
        added = {
            "image_tokens": torch.randn(2, TOKENS, width, generator=generator),
            "image_scale": torch.rand(2, generator=generator) + 0.5,
        }
        first = ("sample", "timestep", "encoder_hidden_states")
        example = {**{name: plain.example[name] for name in first}, **added}
        example |= {name: each for name, each in plain.example.items() if name not in example}
        assert plain.roles is not None
        return dataclasses.replace(
            plain,
            module=PicturedDenoiser(module, layers).eval().requires_grad_(False),
            example=example,
            dynamic={**plain.dynamic, **{name: {0: "batch"} for name in added}},
            keep_fp32=plain.keep_fp32 | {"image_scale"},
            roles=dataclasses.replace(plain.roles, conditioning=(*plain.roles.conditioning, *added)),
        )


def with_ip_adapter(source: Source, files: IpAdapterFiles | None) -> Source:
    """A source whose denoiser takes pictures as part of the prompt, if there are files of an adapter.

    Raises:
        SourceError: if the adapter is none for this source.
        InvalidRequestError: if the family takes none, or the source holds graphs that others exported.
    """
    if files is None:
        return source
    if isinstance(source.weights, GraphFolders):
        raise InvalidRequestError(
            f"{source.name} holds graphs that are run as they are; an IP-Adapter goes with weights"
        )
    if not source.family.controllable:
        raise InvalidRequestError(f"an IP-Adapter for models of the family {source.family.name} is not supported")
    if source.family.settings(source)["guidance"] != "classifier-free":
        raise InvalidRequestError(
            f"{source.name} takes its guidance in; an IP-Adapter for such models is not supported"
        )
    adapter = IpAdapter.open(files, source)
    digest = hashlib.sha256(f"{source.fingerprint}\0ip-adapter\0{adapter.fingerprint}".encode())
    return dataclasses.replace(source, ip_adapter=adapter, fingerprint=digest.hexdigest())


def _widths(unet: Any) -> dict[str, int]:
    """By name of a cross-attention's processor, the width of its keys, in the order in which adapters have them."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return {name: int(unet.get_submodule(name.removesuffix(".processor")).to_k.out_features) for name in names}


def _encoder_config(path: Path) -> dict[str, Any]:
    where = f"{path.name}/config.json"
    if not path.is_dir():
        state = "is no directory" if path.exists() else "does not exist"
        raise SourceError(f"the image encoder {str(path)!r} {state}")
    config = read_json(path / "config.json", f"a directory of a {_CLASS} is expected")
    if config.get("architectures") != [_CLASS]:
        raise SourceError(f"{where}: 'architectures' is {config.get('architectures')!r}, expected [{_CLASS!r}]")
    check_bounds(config, where)
    check_vision(path.name, config)
    empty_vision(path.name, config)
    return config
