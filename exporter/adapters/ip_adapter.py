"""An IP-Adapter: an image as part of the prompt.

Ye et al. 2023 (arXiv 2308.06721): a CLIP image encoder and a projection turn an image into a few tokens. Every
cross-attention of the U-Net attends to them beside the text, with keys and values of its own, and adds both results.
Here the values carry the scale. So the layers that the adapter adds are computed once a request, and every request has
a scale of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import IMAGE_ENCODER

from ..components import AdaptedCheckpoint, Adapter, Component
from ..families.checks import natural
from ..source.description import check_bounds
from ..source.source import Source
from ..source.weights import assign, empty_module, opened, read_json, read_tensors, read_weights, weight_files
from .base import AdapterFiles, Option, content_digest, require_directory
from .clip_vision import DEFAULT_SIDE, STEM, check_vision, empty_vision, load_vision

TOKENS = 4
"""Tokens that an image becomes, as in the paper's first kind of adapter."""

_CLASS = "CLIPVisionModelWithProjection"
_PROJECTION = {"proj.weight": "image_embeds.weight", "proj.bias": "image_embeds.bias"}


@dataclass(frozen=True)
class IpAdapterFiles(AdapterFiles):
    """An IP-Adapter to build in.

    Attributes:
        adapter: A safetensors file.
        encoder: A directory of the CLIP image encoder that the adapter was trained with.
    """

    title: ClassVar[str] = "an IP-Adapter"
    options: ClassVar[tuple[Option, ...]] = (
        Option("--ip-adapter", "FILE", "IP-Adapter, for images in prompts"),
        Option("--image-encoder", "DIR", "CLIPVisionModelWithProjection that the IP-Adapter goes with"),
    )
    controls: ClassVar[bool] = True
    adapter: Path
    encoder: Path

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """Both or neither."""
        adapters, encoders = values.get("ip_adapter", ()), values.get("image_encoder", ())
        if not adapters and not encoders:
            return None
        if not adapters or not encoders:
            raise InvalidRequestError(
                "an IP-Adapter goes with its image encoder; give --ip-adapter and --image-encoder"
            )
        return cls(Path(adapters[-1]), Path(encoders[-1]))

    def check(self, source: Source) -> None:
        """Refuse a model without an unconditional half too: there the image prompt has nothing to stand against."""
        super().check(source)
        if source.family.settings(source)["guidance"] != "classifier-free":
            raise InvalidRequestError(
                f"{source.name} takes its guidance in; an IP-Adapter for such models is not supported"
            )

    def open(self, source: Source) -> IpAdapter:
        """Check both, and that the adapter has tensors for each cross-attention of the source."""
        return IpAdapter.open(self, source)


class ImagePrompt(nn.Module):
    """An image ``[batch, 3, side, side]``, normalised, to tokens ``[batch, 4, width]``, and those of no image."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.projection: Any = projection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode to the tokens of the image, and to those of an embedding of zeros, for the unconditional half."""
        embedded = self.encoder(pixel_values).image_embeds
        return self.projection(embedded), self.projection(torch.zeros_like(embedded))


class DecoupledAttention:
    """Cross-attention to the text and, with other keys and values, to an image; diffusers calls it a processor.

    Args:
        keys: Layer that makes keys of an image's tokens.
        values: Layer that makes values of them.
    """

    def __init__(self, keys: nn.Module, values: nn.Module) -> None:
        self.keys, self.values = keys, values

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor, Tensor], **_: Any
    ) -> Tensor:
        """Attend.

        Args:
            attn: The layer of diffusers that calls this.
            hidden_states: ``[rows, places, width]``.
            encoder_hidden_states: States of the text ``[rows, length, width]``, tokens of an image
                ``[rows, 4, width]``, and their scale ``[rows]``.
        """
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


class ImagePromptDenoiser(nn.Module):
    """A U-Net that takes an image after the text: tokens ``[batch, 4, width]`` and their scale ``[batch]``.

    Args:
        denoiser: The module that is exported without an adapter; its weights keep their names.
        layers: By name of a cross-attention's processor, the layers for keys and values.
    """

    def __init__(self, denoiser: nn.Module, layers: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.unet: Any = denoiser.unet
        self.layers = nn.ModuleList(layer for pair in layers.values() for layer in pair)
        self._denoiser: Any = [denoiser]  # in a list, or torch would name the U-Net's weights twice
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
        """Predict as the denoiser does."""
        rest = () if text_embeds is None else (text_embeds, time_ids)
        states = (encoder_hidden_states, image_tokens, image_scale)
        prediction: Tensor = self._denoiser[0](sample, timestep, states, *rest)
        return prediction


@dataclass(frozen=True)
class IpAdapter(Adapter):
    """A checked IP-Adapter of a source.

    Attributes:
        files: Where it is.
        denoiser: The component that it extends.
        config: Configuration of the image encoder.
        widths: By number of a cross-attention's tensors in the file, the width of its keys and values.
        digest: SHA-256 over all files.
    """

    files: IpAdapterFiles
    denoiser: str
    config: Mapping[str, Any] = field(repr=False)
    widths: Mapping[int, int] = field(repr=False)
    digest: str

    @classmethod
    def open(cls, files: IpAdapterFiles, source: Source) -> IpAdapter:
        """Check adapter and image encoder.

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
        widths = _check_tensors(files, shapes, config, source)
        read = (files.adapter, files.encoder / "config.json", *weight_files(files.encoder, STEM))
        return cls(files, source.family.denoiser, config, widths, content_digest(read))

    @property
    def fingerprint(self) -> str:
        """The digest."""
        return f"\0ip-adapter\0{self.digest}"

    @property
    def components(self) -> tuple[str, ...]:
        """The image encoder with the projection."""
        return (IMAGE_ENCODER,)

    def _tensors(self) -> dict[str, Tensor]:
        name = self.files.adapter.name
        with opened(self.files.adapter, name) as content:
            return dict(read_tensors(content, content.keys(), name))

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """The image encoder with the projection."""
        tower = load_vision(self.files.encoder.name, self.config, read_weights(self.files.encoder, STEM))
        own = {key.removeprefix("image_proj."): each for key, each in self._tensors().items()}
        own = {_PROJECTION.get(key, key): each for key, each in own.items() if not key.startswith("ip_adapter.")}
        rows, width = own["image_embeds.weight"].shape
        projection = ImageProjection(width, rows // TOKENS, TOKENS)
        assign(projection, own, self.files.adapter.name)
        side = int(self.config.get("image_size", DEFAULT_SIDE))
        pixels = torch.randn(2, 3, side, side, generator=generator)
        module = ImagePrompt(tower, projection).eval().requires_grad_(False)
        outputs = ("image_tokens", "no_image_tokens")
        return Component(name, module, {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, outputs)

    def extend(self, component: Component, generator: torch.Generator) -> Component:
        """Let the denoiser take an image's tokens and their scale too."""
        if component.name != self.denoiser:
            return component
        module: Any = component.module
        tensors, layers = self._tensors(), {}
        width = component.example["encoder_hidden_states"].shape[-1]
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
        example = {**{name: component.example[name] for name in first}, **added}
        example |= {name: each for name, each in component.example.items() if name not in example}
        assert component.roles is not None
        return dataclasses.replace(
            component,
            module=ImagePromptDenoiser(module, layers).eval().requires_grad_(False),
            example=example,
            dynamic={**component.dynamic, **{name: {0: "batch"} for name in added}},
            keep_fp32=component.keep_fp32 | {"image_scale"},
            roles=dataclasses.replace(component.roles, conditioning=(*component.roles.conditioning, *added)),
        )

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Images are encoded one by one."""
        return {IMAGE_ENCODER: {"batch": Range.fixed(1)}}


def _check_tensors(
    files: IpAdapterFiles, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], source: Source
) -> dict[int, int]:
    """Check that an adapter has tensors for the projection and for each cross-attention of the source's U-Net.

    Args:
        files: The adapter and its image encoder, for messages.
        shapes: Shapes of the adapter's tensors.
        config: Configuration of the image encoder.
        source: The model.

    Returns:
        By number of a cross-attention's tensors in the file, the width of its keys and values.

    Raises:
        SourceError: naming the first tensor that is missing, has another shape, or has no place.
    """
    name, unet = files.adapter.name, source.configs[source.family.denoiser]
    width = natural("unet", unet, "cross_attention_dim", 1280)
    embedded = natural(files.encoder.name, config, "projection_dim", 512)
    expected = {
        "image_proj.proj.weight": (TOKENS * width, embedded),
        "image_proj.proj.bias": (TOKENS * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    skeleton: Any = empty_module(source.family.parts[source.family.denoiser].build, unet, source.family.denoiser)
    # Files number all attentions, and have tensors for the cross-attentions alone: every second one.
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
    return widths


def _widths(unet: Any) -> dict[str, int]:
    """Widths of keys by name of a cross-attention's processor, in the order in which adapters have them."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return {name: int(unet.get_submodule(name.removesuffix(".processor")).to_k.out_features) for name in names}


def _encoder_config(path: Path) -> dict[str, Any]:
    where = f"{path.name}/config.json"
    require_directory(path, "image encoder")
    config = read_json(path / "config.json", f"a directory of a {_CLASS} is expected")
    if config.get("architectures") != [_CLASS]:
        raise SourceError(f"{where}: 'architectures' is {config.get('architectures')!r}, expected [{_CLASS!r}]")
    check_bounds(config, where)
    check_vision(path.name, config)
    empty_vision(path.name, config)
    return config
