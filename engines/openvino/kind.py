"""OpenVINO as a kind of engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kind import CPU, DECOMPOSED, EngineArguments, EngineKind

if TYPE_CHECKING:
    from .engine import OpenVinoEngine


@dataclass(frozen=True)
class OpenVinoKind(EngineKind):
    """OpenVINO on the CPU."""

    def version(self) -> str:
        """Version of OpenVINO, without the build's name."""
        from . import engine as openvino  # with its rewrites it is loaded for those who use it

        return str(openvino.load_sdk().__version__).partition("-")[0]

    def runs_on(self) -> str:
        """The CPU, and the precisions that it has instructions for."""
        from . import engine as openvino

        return f"CPU: {'fp32, bf16' if openvino.has_bf16(openvino.load_core()) else 'fp32'}"

    def require(self, precision: str | None) -> None:
        """Refuse bf16 on a processor without instructions for it."""
        from . import engine as openvino

        openvino.require_precision(openvino.load_core(), precision or "fp32")

    def make(self, arguments: EngineArguments) -> OpenVinoEngine:
        """The engine of one component; what is neither bf16 nor quantised is computed in fp32."""
        from . import engine as openvino
        from .cache import ModelCache

        precision = arguments.precision if arguments.precision in ("bf16", "int8") else "fp32"
        cache = None
        if arguments.store is not None:
            cache = ModelCache(
                arguments.store,
                arguments.component,
                arguments.graph_sha256,
                arguments.weights_sha256,
                keep=arguments.keep_compiled,
                required=arguments.must_keep,
            )
        return openvino.OpenVinoEngine(
            arguments.path,
            openvino.OpenVinoOptions(precision, arguments.threads, arguments.lengths),
            f"{arguments.component} ({self.name}, {precision})",
            (arguments.inputs, arguments.outputs),
            cache,
            arguments.weights,
        )


OPENVINO = OpenVinoKind(
    name="openvino",
    title="OpenVINO",
    extra="openvino",
    device=CPU,
    # It has no fp8 arithmetic. Its bf16 takes twice as long on native operators as on decomposed ones.
    precisions=("fp32", "fp16", "bf16", "int8", "int8-weights"),
    form=DECOMPOSED,
    rounds={"bf16": "fp32"},  # it rounds the weights by itself
    priority=50,
    compiles=True,
)
"""OpenVINO."""
