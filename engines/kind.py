"""Kinds of engines: everything that the other layers must know of an inference SDK, in one record.

A kind is a subclass of :class:`EngineKind` beside the engine that it makes, and one line in
:data:`latentrt.engines.kinds.KINDS`. Nothing else names it: the command line, ``latentrt doctor``, the exporter's
choice of graphs and ``engine="auto"`` read the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .base import Array, Engine, TensorSpec
from .errors import EngineUnavailableError
from .store import EngineStore

CPU, CUDA = "cpu", "cuda"
"""Devices that an engine runs on."""

PRESENT, MISSING, UNUSABLE = "present", "missing", "unusable"
"""States of an engine: it runs here; something must be installed first; it is installed and cannot run here."""


@dataclass(frozen=True)
class GraphForm:
    """The form in which an engine takes exported graphs.

    Attributes:
        opset: ONNX operator set. From 21 on group normalisation, and from 23 on attention, are single operators.
        unquantized: In a quantised graph, the precision of the operators that are not quantised.
        native: Whether the engine takes attention and group normalisation as single operators, and chooses a kernel for
            each itself; otherwise it takes the operators that they are made of.
    """

    opset: int
    unquantized: str
    native: bool


DECOMPOSED = GraphForm(20, "fp32", native=False)
"""Attention and group normalisation in parts, which the optimisers of CPU engines recognise."""

NATIVE = GraphForm(23, "fp16", native=True)
"""Attention and group normalisation as single operators."""


@dataclass(frozen=True)
class Availability:
    """Result of a look for an engine's SDK and device.

    Attributes:
        name: Name of the engine.
        state: :data:`PRESENT`, :data:`MISSING` or :data:`UNUSABLE`.
        version: Version of its SDK; empty where it is missing.
        detail: The device that it runs on; or the missing package and how to get it; or the reason why it cannot run.
    """

    name: str
    state: str
    version: str
    detail: str


@dataclass(frozen=True)
class EngineArguments:
    """The arguments of :meth:`EngineKind.make`: a component's graph, and how the engine is to open it.

    Attributes:
        component: Part of the model that the graph computes.
        path: The ONNX graph, all of whose files were checked; the compiled plan where the kind needs plans.
        inputs: Inputs of the graph as the manifest lists them.
        outputs: Outputs of the graph as the manifest lists them.
        precision: The precision that the caller asked for; ``None`` for the graph's own.
        threads: Threads inside an operator on a CPU; 0 is automatic.
        low_memory: Keep no memory between runs that the next one could use.
        lengths: Lengths that never vary, by symbol of the graph; given only to kinds that compile.
        weights: Initializers to put in place of the graph's own, by name.
        exchangeable: Initializers that may be exchanged while the engine is open; given only to switchable kinds.
        graph_sha256: SHA-256 (hex) of the ONNX graph's file.
        weights_sha256: Name -> SHA-256 (hex) of every external weights file of the graph.
        store: Compiled models that the engine may use; ``None`` for none.
        keep_compiled: Store models that the engine had to compile.
        must_keep: Fail where a compiled model cannot be stored, in place of a warning.
        target: GPU architectures that a plan was built for, e.g. ``"sm_80+"``; empty without a plan.
    """

    component: str
    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str | None = None
    threads: int = 0
    low_memory: bool = False
    lengths: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, Array] | None = None
    exchangeable: Sequence[TensorSpec] = ()
    graph_sha256: str = ""
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    store: EngineStore | None = None
    keep_compiled: bool = False
    must_keep: bool = False
    target: str = ""


@dataclass(frozen=True)
class EngineKind(ABC):
    """One kind of engine.

    Attributes:
        name: Name in the API and on the command line.
        title: Name in reports.
        extra: Extra of this package that installs its SDK; empty where none does.
        device: :data:`CPU` or :data:`CUDA`.
        precisions: Precisions that it has kernels for, the highest first; of
            :data:`latentrt.runtime.bundle.manifest.PRECISIONS`.
        form: Form of the graphs that it takes.
        rounds: Precision asked for -> precision of the graph that the engine opens, and rounds itself.
        priority: Place among the engines that ``"auto"`` tries, the lowest first; ``None`` keeps it out.
        needs_plans: Whether it opens plans of the bundle's ``engines/`` that the exporter compiled, and no graphs.
        compiles: Whether it compiles a graph when it opens it, faster for fixed lengths, and can keep the result.
        switchable: Whether its engines exchange weights while they are open.
    """

    name: str
    title: str
    extra: str
    device: str
    precisions: tuple[str, ...]
    form: GraphForm
    rounds: Mapping[str, str] = field(default_factory=dict)
    priority: int | None = None
    needs_plans: bool = False
    compiles: bool = False
    switchable: bool = False

    @abstractmethod
    def version(self) -> str:
        """Load the SDK and return its version.

        Raises:
            EngineUnavailableError: if it is missing; the message says how to get it.
        """

    @abstractmethod
    def make(self, arguments: EngineArguments) -> Engine:
        """The engine of one component, not yet opened."""

    def runs_on(self) -> str:
        """The device that the engine would run on here, in a few words.

        Raises:
            EngineUnavailableError: if a library beside the SDK is missing; the message says how to get it.
        """
        return "CPU"

    def unusable(self) -> str:
        """Why the engine cannot run here although its SDK is installed; empty where it can."""
        return ""

    def probe(self) -> Availability:
        """Look whether the engine can run here, by loading its SDK."""
        version = ""
        try:
            version = self.version()
            if reason := self.unusable():
                return Availability(self.name, UNUSABLE, version, reason)
            return Availability(self.name, PRESENT, version, self.runs_on())
        except EngineUnavailableError as error:
            return Availability(self.name, MISSING, version, str(error))

    def require(self, precision: str | None) -> None:
        """Refuse a precision that this machine has no instructions for; the engine itself is present.

        Raises:
            EngineUnavailableError: naming what to choose instead.
        """
        return

    def builds_without_device(self) -> bool:
        """Whether this machine can build a bundle's engines although they cannot run on it."""
        return False

    def graph_precision(self, precision: str | None) -> str | None:
        """Precision of the graph that the engine opens to compute in ``precision``."""
        return None if precision is None else self.rounds.get(precision, precision)
