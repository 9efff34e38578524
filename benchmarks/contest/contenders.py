"""The contenders that can be measured: LatentRT's engines and precisions, and the peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.kinds import KINDS

OURS, PEER = "latentrt", "peer"
"""Kinds of contenders."""


@dataclass(frozen=True)
class Contender:
    """One way to draw the job's image.

    Attributes:
        name: The name on the command line and in reports, e.g. ``latentrt-openvino-bf16``.
        label: The name for people.
        kind: :data:`OURS` or :data:`PEER`.
        program: The module of its program in :mod:`latentrt.benchmarks.peers`; ``None`` is LatentRT's worker.
        environment: Name of the pinned list that its virtual environment is made from; ``None`` is LatentRT's own.
        options: Options for its program beside the job.
    """

    name: str
    label: str
    kind: str
    program: str | None = None
    environment: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        """Whether opening compiles models that the bundle may keep."""
        engine = self.options.get("engine")
        return engine in KINDS and KINDS[engine].compiles


def ours(engine: str, precision: str) -> Contender:
    """LatentRT on one engine at one precision."""
    options = {
        "engine": engine,
        "precision": precision,
        "loop": "auto",
        "engine_cache": "read",
        "fixed_size": KINDS[engine].compiles,  # which is faster then
    }
    return Contender(
        f"latentrt-{engine}-{precision}", f"LatentRT, {KINDS[engine].title} {precision}", OURS, options=options
    )


def _peer(name: str, label: str, program: str, environment: str, **options: Any) -> Contender:
    return Contender(name, label, PEER, program, environment, options)


PEERS = (
    _peer("diffusers-fp32", "diffusers fp32", "diffusers_peer", "diffusers", dtype="fp32", compile=False),
    _peer("diffusers-bf16", "diffusers bf16", "diffusers_peer", "diffusers", dtype="bf16", compile=False),
    _peer(
        "diffusers-fp32-compile",
        "diffusers fp32, torch.compile",
        "diffusers_peer",
        "diffusers",
        dtype="fp32",
        compile=True,
    ),
    _peer(
        "diffusers-bf16-compile",
        "diffusers bf16, torch.compile",
        "diffusers_peer",
        "diffusers",
        dtype="bf16",
        compile=True,
    ),
    _peer("optimum-onnx-fp32", "Optimum-ONNX fp32", "optimum_onnx_peer", "optimum-onnx", dtype="fp32"),
    _peer("openvino-genai-fp32", "OpenVINO GenAI fp32", "openvino_genai_peer", "openvino-genai", precision="fp32"),
    _peer("openvino-genai-bf16", "OpenVINO GenAI bf16", "openvino_genai_peer", "openvino-genai", precision="bf16"),
    _peer("openvino-genai-int8", "OpenVINO GenAI int8", "openvino_genai_peer", "openvino-genai", precision="int8"),
    _peer(
        "stable-diffusion.cpp-fp32",
        "stable-diffusion.cpp fp32",
        "stable_diffusion_cpp_peer",
        "stable-diffusion-cpp",
        dtype="fp32",
    ),
    _peer(
        "stable-diffusion.cpp-fp16",
        "stable-diffusion.cpp fp16",
        "stable_diffusion_cpp_peer",
        "stable-diffusion-cpp",
        dtype="fp16",
    ),
    _peer(
        "stable-diffusion.cpp-q8_0",
        "stable-diffusion.cpp q8_0",
        "stable_diffusion_cpp_peer",
        "stable-diffusion-cpp",
        dtype="q8_0",
    ),
)
"""Every peer in every form that is measured."""

REFERENCES = ("diffusers-fp32", "latentrt-onnxruntime-fp32", "latentrt-openvino-fp32")
"""The reference, whose image and time the others are compared with, is the first of these that took part."""


def known() -> dict[str, Contender]:
    """Every contender by name."""
    engines = [ours(engine, precision) for engine, kind in KINDS.items() for precision in kind.precisions]
    return {contender.name: contender for contender in (*engines, *PEERS)}


def chosen(names: Iterable[str]) -> list[Contender]:
    """Look up contenders by name, each once; ``peers`` names all peers.

    Raises:
        InvalidRequestError: for an unknown name.
    """
    table = known()
    found: dict[str, Contender] = {}
    for name in names:
        if name == "peers":
            found.update({peer.name: peer for peer in PEERS})
        elif name in table:
            found[name] = table[name]
        else:
            raise InvalidRequestError(f"unknown contender {name!r}; known contenders: peers, {', '.join(table)}")
    return list(found.values())
