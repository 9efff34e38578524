"""One execution context of a plan: its stream, its buffers, its CUDA graphs. One thread uses it at a time."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..base import TensorSpec
from ..errors import EngineError, LatentRTError, TensorMismatchError
from .cudart import Cuda
from .memory import Arena, CudaArray, Pool, aligned, itemsize
from .sdk import Sdk, failure, sdk_errors

_logger = logging.getLogger("latentrt.engines.trt")

Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every input, which one set of buffers and graphs serves."""

MAX_GRAPHS = 4
"""Most CUDA graphs of a context. More than one where threads have their own bound inputs."""


@dataclass(frozen=True)
class PlanProfile:
    """Shapes that one optimisation profile of a plan takes.

    Attributes:
        index: Its number in the plan.
        ranges: Input name -> smallest, usual and largest shape, of the inputs with a dynamic shape.
    """

    index: int
    ranges: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether all shapes lie within."""
        return all(
            low <= length <= high
            for name, (smallest, _, largest) in self.ranges.items()
            for low, length, high in zip(smallest, shapes[name], largest, strict=True)
        )

    def distance(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """How far the shapes are from those that the profile is tuned for; 0 is on them."""
        return sum(
            abs(math.log(length / tuned))
            for name, (_, usual, _) in self.ranges.items()
            for length, tuned in zip(shapes[name], usual, strict=True)
        )


def choose_profile(profiles: Sequence[PlanProfile], shapes: Mapping[str, tuple[int, ...]]) -> PlanProfile:
    """The profile that holds the shapes; of several the one that is tuned for the nearest.

    Raises:
        TensorMismatchError: naming an input that no profile holds.
    """
    if fitting := [profile for profile in profiles if profile.holds(shapes)]:
        return min(fitting, key=lambda profile: profile.distance(shapes))
    # An input that fits nowhere is the reason; if each fits somewhere, they do not fit together.
    for name in profiles[0].ranges:
        ranges = [profile.ranges[name] for profile in profiles]
        alone = [PlanProfile(0, {name: each}) for each in ranges]
        if not any(each.holds(shapes) for each in alone):
            choice = " or ".join(f"{low} to {high}" for low, _, high in ranges)
            raise TensorMismatchError(
                f"input {name!r} has shape {shapes[name]}, the plan was built for {choice}; "
                "ask for another size or batch, or build a plan with a profile that holds it"
            )
    asked = ", ".join(f"{name} {shapes[name]}" for name in profiles[0].ranges)
    raise TensorMismatchError(f"no profile of the plan holds {asked} together; build a plan with a profile that does")


class Slab:
    """One buffer on the device that holds several tensors, and grows; with ``staged`` a pinned one on the host too."""

    def __init__(self, cuda: Cuda, label: str, *, staged: bool) -> None:
        self._cuda = cuda
        self._label = label
        self._staged = staged
        self.nbytes = 0
        self.address = 0
        self.host = 0
        self.staging: NDArray[np.uint8] = np.empty(0, np.uint8)
        """The pinned memory, as numpy sees it."""

    def grow(self, nbytes: int) -> bool:
        """Make room for ``nbytes``. Returns whether the addresses changed."""
        if nbytes <= self.nbytes:
            return False
        self.free()
        size = aligned(nbytes)
        self.address = self._cuda.malloc(size, f"inputs and outputs of {self._label}")
        if self._staged:
            self.host = self._cuda.host_malloc(size, f"inputs of {self._label}")
            self.staging = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.host))
        self.nbytes = size
        return True

    def free(self) -> None:
        """Free both."""
        if self.address:
            self._cuda.free(self.address)
        if self.host:
            self._cuda.host_free(self.host)
        self.nbytes = self.address = self.host = 0
        self.staging = np.empty(0, np.uint8)


class Context:
    """Runs a plan for one thread at a time.

    Inputs that come with every run lie in one slab in fixed places: those from the host are gathered in pinned memory
    and go over in one copy, those on the device are copied on the device. Outputs have fixed places too, and are
    copied into an array of their own for the caller. So the addresses that the plan sees are the same run after run,
    and a CUDA graph of it stays valid; the copies are small beside the work.

    Args:
        sdk: The SDK.
        make: Creates the SDK's execution context, with activations left to the user.
        outputs: Specs of the outputs.
        cuda: The device.
        pool: Where memory for outputs comes from.
        arena: Memory of the activations.
        label: Name of the plan in messages.
        graphs: Whether to use CUDA graphs.

    Raises:
        EngineError: if the SDK cannot create the context.
    """

    def __init__(
        self,
        sdk: Sdk,
        make: Callable[[], Any],
        outputs: Mapping[str, TensorSpec],
        cuda: Cuda,
        pool: Pool,
        arena: Arena,
        label: str,
        *,
        graphs: bool,
    ) -> None:
        self._sdk, self._cuda, self._pool, self._arena, self._label = sdk, cuda, pool, arena, label
        self._outputs = outputs
        self._use_graphs = graphs
        self._profile: int | None = None
        self.shapes: Shapes = ()
        self._output_shapes: dict[str, tuple[int, ...]] = {}
        self._activations = 0
        self._device_memory: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        self._inputs_slab = Slab(cuda, label, staged=True)
        self._outputs_slab = Slab(cuda, label, staged=False)
        self._graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.captured = self.replayed = 0
        """CUDA graphs captured, and runs that replayed one."""
        self._stream = cuda.stream()
        try:
            with sdk_errors(sdk, f"create an execution context of {label}") as errors:
                self._context = make()
                if self._context is None:
                    raise failure(sdk, f"create an execution context of {label}", errors)
        except BaseException:
            cuda.destroy_stream(self._stream)
            raise

    def run(
        self,
        feeds: Mapping[str, Any],
        bound: Mapping[str, CudaArray],
        profiles: Sequence[PlanProfile],
        seconds: list[float] | None = None,
    ) -> dict[str, CudaArray]:
        """Run the plan, and wait until the device is done.

        Waiting here keeps everything else simple: buffers may be written again, an error belongs to the run that
        caused it, and whoever measures time measures work.

        Args:
            feeds: All inputs, checked: numpy arrays, or arrays on this device.
            bound: Those of them that stay where they are from run to run: their own memory is the plan's input.
            profiles: The plan's profiles.
            seconds: The device's time is appended here; ``None`` does not measure it.

        Raises:
            TensorMismatchError: if no profile holds the shapes.
            EngineMemoryError: if a buffer does not fit; nothing was run then.
            EngineError: if the SDK or CUDA fails. The context must be closed then.
        """
        shapes = tuple((name, tuple(array.shape)) for name, array in feeds.items())
        if shapes != self.shapes:
            self._set_shapes(shapes, profiles)
        addresses = self._place_inputs({name: array for name, array in feeds.items() if name not in bound})
        addresses |= {name: array.address for name, array in bound.items()}
        places, total = self._layout(
            {
                name: math.prod(shape) * itemsize(self._outputs[name].dtype)
                for name, shape in self._output_shapes.items()
            }
        )
        if self._outputs_slab.grow(total):
            self.drop_graphs()
        addresses |= {name: self._outputs_slab.address + place for name, place in places.items()}
        block = self._pool.take(total)
        with self._arena.reserve(self._activations, self._label) as memory:
            try:
                self._set_addresses(addresses, memory)
                timing = contextlib.nullcontext() if seconds is None else self._cuda.timed(self._stream, seconds)
                with timing:
                    self._execute(tuple(addresses.values()))
                self._cuda.on_device_async(block.address, self._outputs_slab.address, total, self._stream)
            finally:
                # The arena is this run's until the device is done, whatever happened.
                self._cuda.synchronize(self._stream, f"run {self._label}")
        return {
            name: CudaArray(self._cuda, block, place, self._output_shapes[name], self._outputs[name].dtype)
            for name, place in places.items()
        }

    def _set_shapes(self, shapes: Shapes, profiles: Sequence[PlanProfile]) -> None:
        profile = choose_profile(profiles, dict(shapes))
        self.shapes = ()  # until all of it is done
        self.drop_graphs()  # they were captured with the old shapes in the context
        action = f"set the input shapes of {self._label}"
        with sdk_errors(self._sdk, action) as errors:
            if profile.index != self._profile:
                done = self._context.set_optimization_profile_async(profile.index, int(self._stream))
                if not done:
                    raise failure(self._sdk, f"choose an optimisation profile of {self._label}", errors)
                self._cuda.synchronize(self._stream)
                self._profile = profile.index
            for name, shape in shapes:
                if not self._context.set_input_shape(name, shape):
                    raise failure(self._sdk, f"{action} ({name} is {shape})", errors)
            if missing := self._context.infer_shapes():
                raise EngineError(f"{self._label} leaves the shapes of {', '.join(missing)} open; build the plan again")
            self._output_shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
            self._activations = int(self._context.update_device_memory_size_for_shapes())
        for name, shape in self._output_shapes.items():
            if any(length < 0 for length in shape):
                raise EngineError(
                    f"{self._label}: the shape of output {name!r} depends on values, which is not supported"
                )
        self._device_memory = None  # the SDK has divided it anew
        self.shapes = shapes

    @staticmethod
    def _layout(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """Where each tensor begins in a slab, and the slab's size."""
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = end
            end += aligned(size)
        return places, end

    def _place_inputs(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Copy inputs that are not bound into the slab. Returns the addresses."""
        # Places depend on the shapes alone: a graph serves a tensor from the host and from the device alike.
        places, total = self._layout({name: array.nbytes for name, array in feeds.items()})
        if self._inputs_slab.grow(total):
            self.drop_graphs()
        slab = self._inputs_slab
        resident = {}
        begin, end = total, 0
        for name, array in feeds.items():
            if not isinstance(array, np.ndarray):
                resident[name] = array
            elif array.nbytes:
                place = places[name]
                staged = slab.staging[place : place + array.nbytes]
                np.copyto(staged.view(array.dtype).reshape(array.shape), array)
                begin, end = min(begin, place), place + array.nbytes
        if end:
            self._cuda.to_device_async(slab.address + begin, slab.host + begin, end - begin, self._stream)
        # After that copy, which also went over the places between.
        for name, array in resident.items():
            self._cuda.on_device_async(slab.address + places[name], array.address, array.nbytes, self._stream)
        return {name: slab.address + place for name, place in places.items()}

    def _set_addresses(self, addresses: Mapping[str, int], memory: tuple[int, int]) -> None:
        with sdk_errors(self._sdk, f"set the addresses of {self._label}") as errors:
            for name, address in addresses.items():
                if self._addresses.get(name) != address:
                    if not self._context.set_tensor_address(name, address):
                        raise failure(self._sdk, f"set the address of {name!r} of {self._label}", errors)
                    self._addresses[name] = address
            if memory != self._device_memory:
                self.drop_graphs()  # they hold addresses of the old arena
                if self._activations:
                    self._context.set_device_memory(*memory)
                self._device_memory = memory

    def _execute(self, key: tuple[int, ...]) -> None:
        """Put the run into the stream: at first as it is, the second time captured, from then on replayed.

        The first run lets the SDK load and compile what it needs, which a capture must not.
        """
        graph = None
        if self._use_graphs and key in self._graphs:
            graph = self._capture(key) if self._graphs[key] is None else self._graphs[key]
        if graph is not None:
            self._graphs.move_to_end(key)
            self._cuda.launch(graph, self._stream)
            self.replayed += 1
            return
        self._enqueue()
        if self._use_graphs:
            self._graphs[key] = None  # seen once
            while len(self._graphs) > MAX_GRAPHS:
                self._destroy(self._graphs.popitem(last=False)[1])

    def _enqueue(self) -> None:
        with sdk_errors(self._sdk, f"run {self._label}") as errors:
            if not self._context.execute_async_v3(int(self._stream)):
                raise failure(self._sdk, f"run {self._label}", errors)

    def _capture(self, key: tuple[int, ...]) -> Any:
        """A graph of the run, or ``None`` if there can be none.

        A plan that cannot be captured is run call by call from then on. That is the one place where this package does
        something else than it was asked to: it gives the same numbers, only later, and a warning says so.
        """
        self._cuda.synchronize(self._stream)
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue()
            except BaseException:
                self._cuda.abort_capture(self._stream)
                raise
            graph = self._cuda.end_capture(self._stream)
        except LatentRTError as error:
            self._use_graphs = False
            self.drop_graphs()
            # As text: a log that kept the exception would keep this run's buffers with it.
            reason = str(error)
            _logger.warning("%s runs without CUDA graphs, with the same results but slower: %s", self._label, reason)
            return None
        self._graphs[key] = graph
        self.captured += 1
        return graph

    def drop_graphs(self) -> None:
        """Destroy all graphs, since shapes or addresses that they were captured with have changed."""
        while self._graphs:
            self._destroy(self._graphs.popitem()[1])

    def _destroy(self, graph: Any) -> None:
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def close(self) -> None:
        """Free everything, after the device is done with it; failures are logged."""
        with contextlib.suppress(EngineError):  # a failed device is reported by what failed
            self._cuda.synchronize(self._stream)
        self.drop_graphs()
        self._context = None
        self._inputs_slab.free()
        self._outputs_slab.free()
        self._cuda.destroy_stream(self._stream)
