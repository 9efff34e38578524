"""ControlNets beside the denoising loop: their stages, and what they add up at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.errors import BundleError

from ..bundle.manifest import CONTROLNET
from ..engine_calls import Floats, cast_feeds, output_of, outputs_of, to_host
from ..request.control import Control, control_image, twin_of
from .batching import Share, joined
from .binding import bound_to
from .run import ControlState, Run
from .schedule_stage import schedule_rows, schedule_table

if TYPE_CHECKING:
    from ..engine_calls import Conditioning

_SCALE = "control_scale"
_LEAST_GUESS = -1  # in guess mode the first residual has a tenth of its scale, the last all of it


class ControlNets:
    """The ControlNets of a bundle, for one way to run the loop; serves many threads.

    The first adds its residuals to zeros, each of the others to what the one before it left, and the last hands them to
    a twin of the denoiser. Nothing of that is computed here: what one engine hands out is what the next takes in.

    Args:
        engine: Gives the opened engine of a component.
        there: Components of the bundle.
        denoiser: The denoiser's component.
        fused: Whether the loop runs in stages.
    """

    def __init__(self, engine: Callable[[str], Engine], there: Sequence[str], denoiser: str, *, fused: bool) -> None:
        self._engine, self._there, self._fused = engine, frozenset(there), fused
        self.label = twin_of(denoiser, fused=fused)
        self._zeros: tuple[tuple[object, ...], dict[str, Array]] = ((), {})

    @property
    def twin(self) -> Engine:
        """The engine that takes a step in the denoiser's place."""
        return self._engine(self.label)

    def _stage(self, name: str, stage: str) -> Engine | None:
        component = f"{CONTROLNET}{name}{stage}"
        return self._engine(component) if component in self._there else None

    def _last(self, name: str) -> tuple[str, Engine]:
        """What runs at every step, with what messages call it."""
        component = f"{CONTROLNET}{name}{'_step' if self._fused else ''}"
        return component, self._engine(component)

    def condition(self, controls: Sequence[Control], conditioning: Conditioning) -> dict[str, Array]:
        """What the steps need of texts besides what the denoiser needs of them; a row a text.

        What a ControlNet's prompt stage computes has its name before each tensor's.

        Raises:
            EngineError: if an engine fails.
        """
        found: dict[str, Array] = {}
        for name in (str(each.name) for each in controls if self._fused):
            if (prompt := self._stage(name, "_prompt")) is not None:
                known = {each: conditioning[each] for each in prompt.inputs}
                computed = to_host(prompt.run(cast_feeds(prompt, known)))
                found |= {f"{name}:{tensor}": values for tensor, values in computed.items()}
            schedule = self._stage(name, "_schedule")
            wanted = {*self._last(name)[1].inputs, *(() if schedule is None else schedule.inputs)}
            found |= {each: values for each, values in conditioning.items() if each in wanted}
        return found

    def begin(self, run: Run, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Compute once what depends on control images, and on timesteps, alone.

        Raises:
            EngineError: if an engine fails.
        """
        request, states = run.request, []
        count = sum(name.startswith("residual_") for name in self.twin.inputs)
        scales = np.logspace(_LEAST_GUESS, 0, count) if request.guess_mode else np.ones(count)
        for control, pixels in zip(request.control, pictures, strict=True):
            name = str(control.name)
            embed = f"{CONTROLNET}{name}_image"
            feeds = {"control_image": control_image(pixels, request.width, request.height)}
            embedded = output_of(self._engine(embed), embed, "control", feeds)
            if embedded.shape[2:] != run.latent_shape[2:]:
                raise BundleError(f"{embed} does not shrink a picture to the size of latents; build the bundle again")
            table: dict[str, Array] = {}
            if self._fused and (schedule := self._stage(name, "_schedule")) is not None:
                table = schedule_table(schedule, run)
            own = (scales * control.scale).astype(np.float32)
            steers = tuple(
                control.start <= index / len(run) and (index + 1) / len(run) <= control.end for index in range(len(run))
            )
            images = np.ascontiguousarray(np.repeat(embedded, request.images, axis=0))
            states.append(ControlState(name, images, own, steers, table))
        run.controls = tuple(states)

    def residuals(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the twin takes in besides what the denoiser takes, for one fused step of shares with the same controls.

        Args:
            shares: What the call takes further.
            feeds: Inputs of the denoiser's step.

        Raises:
            EngineError: if an engine fails.
        """
        shared = {name: feeds[name] for name in ("registers", "input_scale", "rows")}
        sums: dict[str, Array] | None = None
        for place in range(len(shares[0].run.active_controls)):
            _, engine = self._last(shares[0].run.active_controls[place].name)
            parts = [self._own(share, place, engine) for share in shares]
            if sums is None:
                sums = self._made_zeros(engine, len(shared["rows"]), shares[0].run.latent_shape[2:])
            sums = self._added(engine, {**shared, **joined(parts), **sums})
        return _as_residuals(sums or {})

    def residuals_on_device(self, share: Share, changing: Mapping[str, Array], rows: Array) -> dict[str, Array]:
        """As :meth:`residuals`, for one whole run whose state stays on a device; what does not change is bound."""
        run, sums = share.run, None
        for place, state in enumerate(run.active_controls):
            _, engine = self._last(state.name)

            def constant(place: int = place, engine: Engine = engine) -> dict[str, Array]:
                zeros = self._made_zeros(engine, len(rows), run.latent_shape[2:]) if place == 0 else {}
                return {**self._unchanging(share, place, engine), **zeros, "rows": rows}

            names = bound_to(engine, run, constant)
            feeds = {name: changing[name] for name in ("registers", "input_scale")}
            feeds |= schedule_rows(run, state.schedule, len(share))
            if sums is not None:
                feeds |= sums
            elif "sum_0" not in names:
                feeds |= self._made_zeros(engine, len(rows), run.latent_shape[2:])
            sums = self._added(engine, feeds)
        return _as_residuals(sums or {})

    def _added(self, engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = engine.run(cast_feeds(engine, feeds))
        return {f"sum_{name.removeprefix('residual_')}": values for name, values in found.items()}

    def _own(self, share: Share, place: int, engine: Engine) -> dict[str, Array]:
        state = share.run.active_controls[place]
        return {**self._unchanging(share, place, engine), **schedule_rows(share.run, state.schedule, len(share))}

    def _unchanging(self, share: Share, place: int, engine: Engine) -> dict[str, Array]:
        """Inputs of one ControlNet that stay the same as long as guidance is on or off."""
        run = share.run
        state = run.active_controls[place]
        key = (state.name, run.guided)
        if share.whole and (kept := run.kept.get(key)) is not None:
            return dict(kept)
        prefix, inputs = f"{state.name}:", engine.inputs
        rows = {name.removeprefix(prefix): values for name, values in share.conditioning_rows().items()}
        found = {name: values for name, values in rows.items() if name in inputs}
        found |= {"control": state.embedded[share.first : share.last], _SCALE: _scales(share, state)}
        if share.whole:
            run.kept[key] = found
        return dict(found)

    def _made_zeros(self, engine: Engine, rows: int, size: Sequence[int]) -> dict[str, Array]:
        """What the first ControlNet adds to; made once for calls of one size."""
        key = (engine, rows, *size)
        if self._zeros[0] != key:
            made: dict[str, Array] = {}
            for name, spec in engine.inputs.items():
                if name.startswith("sum_"):
                    height, width = map(_level_length, spec.shape[2:], size)
                    made[name] = np.zeros((rows, int(spec.shape[1]), height, width), spec.dtype)
            self._zeros = key, made
        return self._zeros[1]

    def plain(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The same for a step of the whole denoiser: sums in numpy, of ControlNets that are whole too.

        Takes the inputs of the denoiser, with one row a sample and half.

        Raises:
            EngineError: if an engine fails.
        """
        total: dict[str, Floats] = {}
        for place in range(len(shares[0].run.active_controls)):
            states = [share.run.active_controls[place] for share in shares]
            label, engine = self._last(states[0].name)
            images = [
                state.embedded[share.first : share.last]
                for share, state in zip(shares, states, strict=True)
                for _ in range(2 if share.run.guided else 1)
            ]
            own = {name: values for name, values in feeds.items() if name in engine.inputs}
            found = outputs_of(engine, label, list(engine.outputs), {**own, "control": np.concatenate(images)})
            scales = np.concatenate([_scales(share, state) for share, state in zip(shares, states, strict=True)])
            for name, values in found.items():
                number = int(name.removeprefix("residual_"))
                scaled = values * scales[:, number, None, None, None]
                total[name] = total[name] + scaled if name in total else scaled
        return {**total}


def _level_length(length: int | str, side: int) -> int:
    """Length of a side of a residual, for latents whose side it is; an engine for one size has it as a number."""
    if isinstance(length, int):
        return length
    # Named like latent_height_2: halved twice, rounding up.
    halvings = int(length.removeprefix("latent_height").removeprefix("latent_width").removeprefix("_") or 0)
    return -(-side >> halvings)


def _scales(share: Share, state: ControlState) -> Floats:
    """How much of each residual, ``[rows, residuals]``; in guess mode nothing for the unconditional half."""
    count = len(share)
    scales = np.repeat(state.scales[None], count * (2 if share.run.guided else 1), axis=0)
    if share.run.guided and share.run.request.guess_mode:
        scales[:count] = 0
    return scales


def _as_residuals(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {f"residual_{name.removeprefix('sum_')}": values for name, values in sums.items()}
