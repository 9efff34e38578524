"""What a bundle is said to be able to do is what it does, and all else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle
from latentrt.runtime.abilities import abilities
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.request.options import FAMILY_OPTIONS
from latentrt.runtime.samplers import SAMPLERS


def test_a_bundle_tells_what_steers(tiny: Any, tiny_bundles: dict[str, Path]) -> None:
    """ControlNets and an IP-Adapter are among its abilities."""
    told = abilities(Bundle.open(tiny.controlled("sd1")))
    assert (told["controlnets"], told["ip_adapter"]) == (["depth", "edges"], True)
    told = abilities(Bundle.open(tiny_bundles["sd1"]))
    assert (told["controlnets"], told["ip_adapter"]) == ([], False)


def test_a_bundle_does_what_inspect_names_and_refuses_the_rest(tiny_bundles: dict[str, Path]) -> None:
    """Each sampler that is named draws, and each other one is one clear sentence; so are foreign options."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    told = abilities(bundle)
    assert "euler" in told["samplers"]
    assert set(told["samplers"]) < set(SAMPLERS), "flow matching needs a model of its own"
    for name in SAMPLERS:
        request = create_request(bundle.manifest, "a red apple", sampler=name, steps=8)
        if name in told["samplers"]:
            assert len(request.compile_plan(bundle.manifest.scheduler)) >= 8
        else:
            with pytest.raises(InvalidRequestError, match=r"\w"):
                request.compile_plan(bundle.manifest.scheduler)
    for name in set(FAMILY_OPTIONS) - {"negative_prompt", "clip_skip", "prompt_syntax"}:
        assert name not in told["options"]
    with pytest.raises(InvalidRequestError, match="models of the family stable-diffusion have no prompt_2"):
        create_request(bundle.manifest, "a red apple", prompt_2="a rocket")
    with pytest.raises(InvalidRequestError, match="width is 33, expected a multiple of 2; the nearest are 32 and 34"):
        create_request(bundle.manifest, "a red apple", width=33)
