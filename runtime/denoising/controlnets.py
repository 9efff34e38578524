"""Steps with ControlNets: their stages, their residuals, and the twin of the denoiser that takes these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.errors import BundleError

from ..bundle.manifest import CONTROLNET
from ..engine_calls import Conditioning, Floats, cast_feeds, output_of, outputs_of, to_host
from ..request.control import control_image, twin_of
from ..request.request import Request
from .batching import Share, joined
from .binding import bound_to
from .run import ControlState, Run
from .schedule_stage import schedule_rows, schedule_table
from .steppers import OUTPUTS, EngineStepper

_SCALE = "control_scale"
_LEAST_GUESS = -1  # in guess mode the first residual has a tenth of its scale, the last all of it


class ControlledStepper(EngineStepper):
    """Steps in which ControlNets steer: a twin of the denoiser takes their residuals.

    In the fused loop the first ControlNet adds its residuals to zeros, each of the others to the output of the one
    before it, and the last hands the sums to the twin. Nothing of that is computed here: what one engine hands out is
    what the next takes. In the plain loop the sums are numpy's.

    Args:
        engine: Gives the opened engine of a component.
        components: Components of the bundle.
        denoiser: The denoiser's component.
        fused: Whether the loop runs in stages.
    """

    def __init__(
        self, engine: Callable[[str], Engine], components: Collection[str], denoiser: str, *, fused: bool
    ) -> None:
        super().__init__(twin_of(denoiser, fused=fused), OUTPUTS["fused" if fused else "plain"])
        self._engine, self._components, self._fused = engine, frozenset(components), fused
        self._zeros: tuple[tuple[object, ...], dict[str, Array]] = ((), {})

    @property
    def engine(self) -> Engine:
        """The twin's engine."""
        return self._engine(self.label)

    def takes(self, run: Run) -> bool:
        """Whether a ControlNet steers the run's next step."""
        return bool(run.controls) and any(each.steers[run.index] for each in run.controls)

    def group(self, run: Run) -> tuple[str, ...]:
        """The ControlNets that steer: their engines are called for all shares at once."""
        return tuple(each.name for each in run.active_controls)

    def _stage(self, name: str, stage: str) -> Engine | None:
        component = f"{CONTROLNET}{name}{stage}"
        return self._engine(component) if component in self._components else None

    def _last(self, name: str) -> tuple[str, Engine]:
        """The component of a ControlNet that runs at every step, and its engine."""
        component = f"{CONTROLNET}{name}{'_step' if self._fused else ''}"
        return component, self._engine(component)

    def conditioning_key(self, request: Request) -> tuple[str | None, ...] | None:
        """The names of the request's ControlNets."""
        return tuple(each.name for each in request.control) or None

    def condition(self, request: Request, conditioning: Conditioning) -> dict[str, Array]:
        """The conditioning of the ControlNets' steps; names of a prompt stage's outputs begin with the ControlNet's.

        Raises:
            EngineError: if an engine fails.
        """
        found: dict[str, Array] = {}
        for name in (str(each.name) for each in request.control if self._fused):
            if (prompt := self._stage(name, "_prompt")) is not None:
                known = {each: conditioning[each] for each in prompt.inputs}
                computed = to_host(prompt.run(cast_feeds(prompt, known)))
                found |= {f"{name}:{tensor}": values for tensor, values in computed.items()}
            schedule = self._stage(name, "_schedule")
            wanted = {*self._last(name)[1].inputs, *(() if schedule is None else schedule.inputs)}
            found |= {each: values for each, values in conditioning.items() if each in wanted}
        return found

    def begin(self, run: Run, control_images: Sequence[NDArray[np.uint8]]) -> None:
        """Embed the control images, and run the ControlNets' schedule stages on all timesteps.

        Raises:
            EngineError: if an engine fails.
            BundleError: if a ControlNet does not shrink an image to the size of the latents.
        """
        request, states = run.request, []
        if not request.control:
            return
        count = sum(name.startswith("residual_") for name in self.engine.inputs)
        scales = np.logspace(_LEAST_GUESS, 0, count) if request.guess_mode else np.ones(count)
        for control, pixels in zip(request.control, control_images, strict=True):
            name = str(control.name)
            embed = f"{CONTROLNET}{name}_image"
            feeds = {"control_image": control_image(pixels, request.width, request.height)}
            embedded = output_of(self._engine(embed), embed, "control", feeds)
            if embedded.shape[2:] != run.latent_shape[2:]:
                raise BundleError(f"{embed} does not shrink an image to the size of latents; build the bundle again")
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

    def extra(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Residuals for a step of shares with the same ControlNets.

        Raises:
            EngineError: if an engine fails.
        """
        return self._chained(shares, feeds) if self._fused else self._summed(shares, feeds)

    def _chained(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """In the fused loop: each ControlNet's step adds to the sums of the one before it."""
        shared = {name: feeds[name] for name in ("registers", "input_scale", "rows")}
        sums: dict[str, Array] | None = None
        for place, state in enumerate(shares[0].run.active_controls):
            _, engine = self._last(state.name)
            parts = [self._own(share, place, engine) for share in shares]
            if sums is None:
                sums = self._made_zeros(engine, len(shared["rows"]), shares[0].run.latent_shape[2:])
            sums = self._added(engine, {**shared, **joined(parts), **sums})
        return _as_residuals(sums or {})

    def extra_on_device(self, share: Share, changing: Mapping[str, Array]) -> dict[str, Array]:
        """As :meth:`extra`, for one whole run whose state stays on a device; what does not change is bound.

        Raises:
            EngineError: if an engine fails.
        """
        run, sums = share.run, None
        rows = len(share) * (2 if run.guided else 1)
        for place, state in enumerate(run.active_controls):
            _, engine = self._last(state.name)

            def constant(place: int = place, engine: Engine = engine) -> dict[str, Array]:
                zeros = self._made_zeros(engine, rows, run.latent_shape[2:]) if place == 0 else {}
                return {**self._unchanging(share, place, engine), **zeros, "rows": share.rows()}

            names = bound_to(engine, run, constant)
            feeds = {name: changing[name] for name in ("registers", "input_scale")}
            feeds |= schedule_rows(run, state.schedule, len(share))
            if sums is not None:
                feeds |= sums
            elif "sum_0" not in names:
                feeds |= self._made_zeros(engine, rows, run.latent_shape[2:])
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
        """The sums that the first ControlNet adds to; made once for calls of one size."""
        key = (engine, rows, *size)
        if self._zeros[0] != key:
            made: dict[str, Array] = {}
            for name, spec in engine.inputs.items():
                if name.startswith("sum_"):
                    height, width = map(_level_length, spec.shape[2:], size)
                    made[name] = np.zeros((rows, int(spec.shape[1]), height, width), spec.dtype)
            self._zeros = key, made
        return self._zeros[1]

    def _summed(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """In the plain loop: residuals of whole ControlNets, summed in numpy."""
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
    """The factor on each residual, ``[rows, residuals]``; zero for the unconditional half in guess mode."""
    count = len(share)
    scales = np.repeat(state.scales[None], count * (2 if share.run.guided else 1), axis=0)
    if share.run.guided and share.run.request.guess_mode:
        scales[:count] = 0
    return scales


def _as_residuals(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {f"residual_{name.removeprefix('sum_')}": values for name, values in sums.items()}
