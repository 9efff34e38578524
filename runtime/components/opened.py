"""The opened engines of a bundle; those that not every request needs are opened when one first needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError, EngineClosedError


class OpenedEngines:
    """Engines by component. Serves many threads.

    Args:
        engines: Engines that are open already.
        components: Components that the bundle has.
        opener: Opens the engine of another component; ``None`` opens none.
        closed: An event that is set once no engine may be opened any more; several objects may share it.

    Attributes:
        engines: The engines that are open, by component.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        components: Collection[str],
        opener: Callable[[str], Engine] | None,
        closed: threading.Event,
    ) -> None:
        self.engines = dict(engines)
        self._components, self._opener, self._closed = components, opener, closed
        self._lock = threading.Lock()

    def __call__(self, component: str) -> Engine:
        """The engine of a component, opened now if no request needed it before.

        Raises:
            BundleError: if the bundle lacks the component, or the caller opened the engines without it.
            EngineClosedError: if the engines were closed.
            EngineUnavailableError: if the engine cannot run here.
        """
        if (engine := self.engines.get(component)) is not None:
            return engine
        with self._lock:
            if self._closed.is_set():
                raise EngineClosedError("the pipeline is closed; load the bundle again with Pipeline.load")
            if component not in self.engines:
                if component not in self._components or self._opener is None:
                    raise BundleError(f"{component} is needed, and the pipeline has no engine of that component")
                self.engines = {**self.engines, component: self._opener(component)}
            return self.engines[component]

    def close(self) -> None:
        """Close every engine; no other is opened after that."""
        with self._lock:
            self._closed.set()
            for engine in self.engines.values():
                engine.close()
