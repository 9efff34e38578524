"""Switching LoRAs while a pipeline serves: the engines of the components that they change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence

from latentrt.engines import Array, Engine
from latentrt.engines.onnxrt import OnnxRuntimeEngine

from ..bundle.reader import Bundle
from ..families import Family
from ..lora.reading import Lora, Loras, lora_files, read_lora
from .engine_choice import EngineSettings, graph_for
from .lora_weights import SpareMemory, changed_weights, target_of
from .offloading import Offloader
from .opening import open_engines


def read_loras(bundle: Bundle, family: Family, given: Loras) -> list[Lora]:
    """Read the LoRAs that a caller gives, and check them against the bundle's model.

    Raises:
        InvalidRequestError: if ``given`` is no list of files and scales.
        SourceError: if a file is damaged, no LoRA, or one for another model.
        BundleError: if the bundle does not say which layers it has.
    """
    files = lora_files(given)
    target = target_of(bundle, family) if files else None
    return [read_lora(target, file) for file in files] if target else []


class LoraEngines:
    """Opens components of a bundle with LoRAs added to the bundle's own weights. Serves many threads.

    Args:
        bundle: The bundle.
        family: Its family.
        settings: How engines are made.
        offloader: Opens and closes the engines, if only one may be open at a time.
        engines: The open engines, without any LoRA.
    """

    def __init__(
        self,
        bundle: Bundle,
        family: Family,
        settings: EngineSettings,
        offloader: Offloader | None,
        engines: Mapping[str, Engine],
    ) -> None:
        self._bundle, self._family, self._settings = bundle, family, settings
        self._offloader = offloader
        self._plain = dict(engines) if settings.switchable else {}  # stay open, whichever LoRAs are on
        self._memory = SpareMemory()
        self._known: weakref.WeakSet[Engine] = weakref.WeakSet()  # which requests under way may still use

    def open(
        self, engines: Mapping[str, Engine], loras: Sequence[Lora], changed: Collection[str]
    ) -> tuple[dict[str, Engine], set[str]]:
        """Open engines with other LoRAs; components that neither these nor the LoRAs before change keep their engines.

        Args:
            engines: The open engines by component.
            loras: The LoRAs to put on.
            changed: Components among these whose weights are not the bundle's.

        Returns:
            The engines by component, and the components whose weights are not the bundle's any more.

        Raises:
            InvalidRequestError: for a plan that was not built to be refitted.
            EngineError: if an engine does not open.
        """
        graphs = {name: graph_for(self._bundle, name, self._settings) for name in engines}
        weights = changed_weights(self._bundle, self._family, graphs, loras, self._memory)
        components = [name for name in engines if name in weights or name in changed]
        opened = self._opened(components, weights)
        self._known.update([*opened.values(), *(engines[name] for name in components)])
        return {**engines, **opened}, set(weights)

    def _opened(self, components: Sequence[str], weights: Mapping[str, Mapping[str, Array]]) -> dict[str, Engine]:
        """Engines of components with these weights; an open engine is reused if it can exchange them."""
        found: dict[str, Engine] = {}
        for name in components:
            plain = self._plain.get(name)
            if plain is not None and name not in weights:
                found[name] = plain
            elif isinstance(plain, OnnxRuntimeEngine) and weights[name].keys() <= plain.exchangeable.keys():
                found[name] = engine = plain.with_weights(weights[name]).open()
                weakref.finalize(engine, self._memory.keep, name, list(weights[name].values()))
        rest = [name for name in components if name not in found]
        return {**found, **open_engines(self._bundle, rest, self._settings, self._offloader, weights)}

    def opener(self, loras: Sequence[Lora], changed: set[str]) -> Callable[[str], Engine]:
        """A function that opens the engine of one more component with LoRAs.

        Args:
            loras: The LoRAs that are on.
            changed: The components whose weights are not the bundle's; the function adds the component if the LoRAs
                change it.
        """
        return functools.partial(self._open_one, loras, changed)

    def _open_one(self, loras: Sequence[Lora], changed: set[str], component: str) -> Engine:
        graphs = {component: graph_for(self._bundle, component, self._settings)}
        weights = changed_weights(self._bundle, self._family, graphs, loras, self._memory)
        if self._settings.switchable and component not in self._plain:
            self._plain |= open_engines(self._bundle, [component], self._settings, self._offloader)
        engine = self._opened([component], weights)[component]
        self._known.add(engine)
        changed.update(weights)
        return engine

    def close(self) -> None:
        """Close every engine that was opened or replaced here."""
        for engine in [*self._known, *self._plain.values()]:
            engine.close()
        self._memory.close()
