"""Count the operations of a graph and the least traffic that it causes, for the shapes of a request.

:mod:`latentrt.benchmarks.roofline.operators` says how many operations each operator takes;
:mod:`latentrt.benchmarks.roofline.placing` compares a measured time with what the machine allows for this work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import onnx

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.denoising.schedule_stage import TIMESTEPS_AT_ONCE

from .graph_shapes import Tensor, read_graph, resolve
from .operators import operations


@dataclass(frozen=True)
class Work:
    """The work of running a graph, on any engine.

    Attributes:
        flops: Floating-point operations, including those on 8-bit integers in quantised products. Arithmetic on shapes
            and indices does not count, nor does what follows from constants alone, which an engine computes when it
            loads the graph.
        bytes: Traffic that no engine can avoid: every input, every weight and every output once, in the types that the
            graph declares. Values between nodes are assumed to stay in caches. A table from which rows are gathered
            counts only the rows that are read.
        by_operator: Floating-point operations by operator, in descending order, without operators that have none.
        products: Operations of products of matrices and convolutions, including the two products of an Attention.
    """

    flops: int
    bytes: int
    by_operator: Mapping[str, int] = field(repr=False)
    products: int

    def times(self, calls: int) -> Work:
        """The work of a number of equal calls."""
        by_operator = {name: calls * flops for name, flops in self.by_operator.items()}
        return Work(calls * self.flops, calls * self.bytes, by_operator, calls * self.products)

    def __add__(self, other: Work) -> Work:
        by_operator = Counter(self.by_operator) + Counter(other.by_operator)
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            dict(by_operator.most_common()),
            self.products + other.products,
        )


class StageWork(NamedTuple):
    """The work of a stage of a request.

    Attributes:
        work: The work of all calls in one sample of its time: both prompts of the text encoder, one step of the loop.
        calls: Calls of the engine in that sample.
        precision: Precision of the stage's graph; a form of reduced precision may keep some stages in a higher one.
    """

    work: Work
    calls: int
    precision: str


def count(path: Path, shapes: Mapping[str, Sequence[int]]) -> Work:
    """Count the operations and the least traffic of one call of a graph.

    Args:
        path: An ONNX graph. Weights in other files are not read.
        shapes: Shape of every input of the graph, by name.

    Raises:
        InvalidRequestError: if the shapes do not fit the graph's inputs.
        BundleError: if it is not a graph, or if the operations of any operator are unknown.
    """
    return count_model(read_graph(path), shapes, str(path))


def count_model(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], label: str = "the graph") -> Work:
    """:func:`count` for a graph that was read already; messages call it ``label``."""
    tensors = resolve(model, shapes, label)
    flops: Counter[str] = Counter()
    products = 0
    for node in model.graph.node:
        total, of_products = operations(node, tensors, f"{label}: {node.op_type} {node.name or node.output[0]!r}")
        flops[node.op_type] += total
        products += of_products
    by_operator = {name: total for name, total in flops.most_common() if total}
    return Work(sum(flops.values()), _traffic(model.graph, tensors), by_operator, products)


def bundle_work(
    bundle: Bundle,
    form: str,
    *,
    images: int,
    guided: bool,
    width: int,
    height: int,
    steps: int,
    registers: int = 1,
) -> dict[str, StageWork]:
    """Count the stages of a request as :class:`~latentrt.runtime.Pipeline` runs them.

    Args:
        bundle: The bundle.
        form: Form of the graphs, such as ``"opset20-fp32"``.
        images: Images of the request.
        guided: Whether guidance computes the unconditional half too.
        width: Width in pixels.
        height: Height in pixels.
        steps: Calls of the denoiser; a sampler of second order makes more than the request has steps.
        registers: Registers of the sampler's plan, which affect only the last few operations of a fused step.

    Returns:
        The work by stage: ``text_encoder`` and ``prompt`` (one call for each prompt), ``schedule`` (all timesteps of
        the request, in one call or a few), ``step`` (one call), ``plain_step`` (one call of the whole denoiser),
        ``vae_decoder``. A bundle without the denoiser's stages has no entries for them, and a form without the whole
        denoiser has no ``plain_step``.

    Raises:
        BundleError: if the bundle has no such graphs, or one cannot be counted.
    """
    factor = bundle.manifest.latent.vae_scale_factor
    texts, rows = (2, 2 * images) if guided else (1, images)
    lengths = {"latent_height": height // factor, "latent_width": width // factor}
    lengths |= {"registers": registers, "terms": registers + 2}
    tokens = max(tokenizer.max_length for tokenizer in bundle.manifest.tokenizers.values())
    lengths |= {"text_length": tokens, "embeddings": 1}  # a prompt of one chunk, without textual inversion

    def stage(component: str, *batches: int) -> StageWork:
        """The work of one call for each number of rows in ``batches``."""
        graph = bundle.graph(component, form)
        path = bundle.graph_path(component, form)
        model = read_graph(path)
        work = Work(0, 0, {}, 0)
        for batch, calls in Counter(batches).items():
            shapes = input_shapes(graph.inputs, {**lengths, "batch": batch, "rows": rows}, component)
            work += count_model(model, shapes, str(path)).times(calls)
        return StageWork(work, len(batches), graph.precision)

    there = {name for name, component in bundle.manifest.components.items() if form in component.graphs}
    found = {"text_encoder": stage("text_encoder", *[1] * texts)}
    if "unet_prompt" in there:
        found["prompt"] = stage("unet_prompt", *[1] * texts)
    if "unet_schedule" in there:
        vectors = len(bundle.graph("unet_schedule", form).inputs) > 1  # of a text, so that every text has its own rows
        total = steps * texts if vectors else steps
        parts = [min(TIMESTEPS_AT_ONCE, total - first) for first in range(0, total, TIMESTEPS_AT_ONCE)]
        found["schedule"] = stage("unet_schedule", *parts)
    if "unet_step" in there:
        found["step"] = stage("unet_step", images)
    if "unet" in there or "unet_step" not in there:
        found["plain_step"] = stage("unet", rows)
    found["vae_decoder"] = stage("vae_decoder", images)
    return found


def input_shapes(specs: Sequence[TensorSpec], lengths: Mapping[str, int], label: str) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs with lengths in place of their symbols.

    Raises:
        BundleError: if a symbol is not among ``lengths``; the message calls the graph ``label``.
    """
    for spec in specs:
        for each in spec.shape:
            if isinstance(each, str) and each not in lengths:
                raise BundleError(f"{label}: the input {spec.name!r} has a length {each!r}, which no request decides")
    return {spec.name: tuple(lengths[each] if isinstance(each, str) else each for each in spec.shape) for spec in specs}


def _traffic(graph: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of inputs, weights and outputs, each once."""
    gathered: Counter[str] = Counter()
    whole = {each.name for each in graph.output}
    for node in graph.node:
        rows_of = node.input[0] if node.op_type == "Gather" and not node.domain else None
        whole.update(name for name in node.input if name != rows_of)
        if rows_of:
            gathered[rows_of] += tensors[node.output[0]].nbytes
    weights = {each.name for each in graph.initializer}
    inputs = {each.name for each in graph.input} - weights
    weights |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    read = sum(
        tensors[name].nbytes if name in whole else min(tensors[name].nbytes, gathered[name])
        for name in inputs | weights
    )
    return read + sum(tensors[each.name].nbytes for each in graph.output)
