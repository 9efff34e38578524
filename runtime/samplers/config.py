"""Reading a diffusers ``scheduler_config.json`` the way ``TargetScheduler.from_config`` does.

Keys that the target sampler does not know are left unread; keys that are missing take the default of the target
sampler's diffusers class; keys listed under ``_use_default_values`` count as missing. Every value that is read is
checked, and a value that cannot be right is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from latentrt.engines.checks import check_choice, check_flag, check_integer, check_number, is_number, show
from latentrt.engines.errors import InvalidRequestError


@dataclass(frozen=True)
class Config:
    """A scheduler config whose values are checked as they are read.

    Attributes:
        values: Keys that count as given.
        class_name: The diffusers class that wrote the config; empty if it does not say.
    """

    values: Mapping[str, Any]
    class_name: str

    @classmethod
    def parse(cls, scheduler_config: Mapping[str, Any]) -> Config:
        """Check the form of a config and drop the keys that only record a default, as null does too.

        Raises:
            InvalidRequestError: if it is not a mapping from strings.
        """
        if not isinstance(scheduler_config, Mapping) or not all(isinstance(key, str) for key in scheduler_config):
            raise InvalidRequestError(
                f"scheduler_config is {type(scheduler_config).__name__}, expected a mapping from names to values"
            )
        name = scheduler_config.get("_class_name", "")
        if not isinstance(name, str):
            raise InvalidRequestError(f"_class_name is {show(name)}, expected the name of a diffusers scheduler class")
        dropped = scheduler_config.get("_use_default_values") or ()
        if not isinstance(dropped, Sequence) or isinstance(dropped, str):
            raise InvalidRequestError(f"_use_default_values is {show(dropped)}, expected a list of names")
        given = {key: value for key, value in scheduler_config.items() if value is not None and key not in dropped}
        return cls(given, name)

    def _error(self, key: str, expected: str) -> InvalidRequestError:
        return InvalidRequestError(f"scheduler config: {key} is {show(self.values[key])}, expected {expected}")

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        return check_flag(_named(key), self.values.get(key, default))

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return check_integer(_named(key), self.values.get(key, default), low, high)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return check_number(_named(key), self.values.get(key, default), None)

    def positive(self, key: str) -> float | None:
        """A finite number above zero, or None where the key is missing."""
        if key not in self.values:
            return None
        value = self.number(key, 0.0)
        if value <= 0:
            raise self._error(key, "a number above zero")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of ``choices``."""
        return check_choice(_named(key), self.values.get(key, default), choices)

    def refuse_thresholding(self) -> None:
        """Refuse dynamic thresholding, which no linear program can do.

        Raises:
            InvalidRequestError: naming the key.
        """
        if self.flag("thresholding"):
            raise self._error("thresholding", "false: dynamic thresholding is not linear and does not suit latents")

    def refuse_clipping(self, clipping_class: str = "") -> None:
        """Refuse clipping of the predicted sample, which no linear program can do.

        Args:
            clipping_class: The diffusers class for which a missing ``clip_sample`` means true. That default is meant
                for models of pixels. In a config that another class wrote, as when a user switches samplers, a
                missing key says nothing about clipping, and latents are not clipped.

        Raises:
            InvalidRequestError: naming the key.
        """
        if self.flag("clip_sample", bool(clipping_class) and self.class_name == clipping_class):
            raise InvalidRequestError(
                "scheduler config: clip_sample is true, but clipping is not linear and does not suit latents; "
                'set "clip_sample": false'
            )


@dataclass(frozen=True)
class Request:
    """Options of a sampler besides the config.

    Attributes:
        steps: Number of steps, or None where custom timesteps or sigmas set it.
        timesteps: Custom timesteps, descending, or None.
        sigmas: Custom noise levels, in the form that the sampler's diffusers class takes, or None.
        eta: Amount of noise for the samplers that have a choice, or None for the sampler's own default.
        mu: Dynamic shift of a flow schedule, read where the config says ``use_dynamic_shifting``, or None.
        begin: Steps to leave out at the start: the plan then goes on from the latent that they leave, but knows no
            more of them. Only samplers that keep a history read it; the plans of others are cut afterwards.
        strength: Share of the distilled timesteps, from the last on, among which samplers of distilled models choose.
    """

    steps: int | None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None
    mu: float | None = None
    begin: int = 0
    strength: float | None = None

    def custom_timesteps(self, train_timesteps: int) -> tuple[float, ...] | None:
        """The custom timesteps, checked to descend within the trained range.

        Raises:
            InvalidRequestError: if they do not.
        """
        given = self.timesteps
        if given is None:
            return None
        if not all(0 <= t < train_timesteps for t in given) or any(b >= a for a, b in pairwise(given)):
            raise InvalidRequestError(
                f"custom timesteps are {list(given)}, expected numbers that descend from at most "
                f"{train_timesteps - 1} to 0"
            )
        return given

    def count(self, train_timesteps: int) -> int:
        """Number of steps, checked against the number of trained timesteps.

        Raises:
            InvalidRequestError: if there are more steps than trained timesteps.
        """
        if self.steps is None:
            raise InvalidRequestError("steps is missing, expected a number of steps or custom timesteps or sigmas")
        if self.steps > train_timesteps:
            raise InvalidRequestError(
                f"steps is {self.steps}, expected at most the {train_timesteps} timesteps "
                "that the model was trained with"
            )
        return self.steps


def parse_request(
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    eta: float | None,
    mu: float | None,
) -> Request:
    """Check the options of a sampler.

    Raises:
        InvalidRequestError: naming the argument that cannot be served.
    """
    if steps is not None:
        steps = check_integer("steps", steps, 1)
    if timesteps is not None and sigmas is not None:
        raise InvalidRequestError("both timesteps and sigmas are given, expected at most one of them")
    if steps is None and timesteps is None and sigmas is None:
        raise InvalidRequestError("steps is missing, expected a number of steps or custom timesteps or sigmas")
    eta = None if eta is None else check_number("eta", eta, 0, 1)
    mu = None if mu is None else check_number("mu", mu, None)
    custom_timesteps = _numbers("timesteps", timesteps)
    if custom_timesteps is not None:
        if steps is not None and steps != len(custom_timesteps):
            raise InvalidRequestError(f"steps is {steps}, but {len(custom_timesteps)} custom timesteps are given")
        steps = len(custom_timesteps)
    return Request(
        steps=steps,
        timesteps=custom_timesteps,
        sigmas=_numbers("sigmas", sigmas),
        eta=eta,
        mu=mu,
    )


def _named(key: str) -> str:
    return f"scheduler config: {key}"


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        found = list(values)
    except TypeError:
        raise InvalidRequestError(f"{name} is {show(values)}, expected a sequence of numbers") from None
    if not found or not all(map(is_number, found)):
        raise InvalidRequestError(f"{name} is {show(values)}, expected at least one number, all finite")
    return tuple(map(float, found))
