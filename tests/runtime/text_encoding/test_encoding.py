"""The encoding of prompts: which states the denoiser gets, and which texts the cache saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array, FakeEngine
from latentrt.engines.errors import (
    BundleError,
    InvalidRequestError,
)
from latentrt.runtime import Bundle, Pipeline


def test_clip_skip_takes_the_layer_before(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """At 1 the prompt's states are the penultimate ones; as in diffusers, the negative prompt's stay the last."""
    for clip_skip in (0, 1):
        pipe("a red apple", steps=1, clip_skip=clip_skip, sampler="euler", guidance=4)
    zero, one = (call["encoder_hidden_states"] for call in engines["unet"].calls)
    np.testing.assert_array_equal(one, zero / [[[1]], [[2]]])


def test_a_graph_that_lacks_an_output(plain_model: Any, bundle: Bundle) -> None:
    """A text encoder without penultimate states is named when they are asked for, and serves otherwise."""
    whole = plain_model.fakes()
    (states, _), inputs = whole["text_encoder"].outputs.values(), whole["text_encoder"].inputs.values()
    last = FakeEngine(inputs, [states], lambda feeds: {states.name: plain_model.encode(feeds)[states.name]}).open()
    pipe = Pipeline(bundle, {**whole, "text_encoder": last})
    assert pipe("a red apple", steps=1).images.shape == (1, 32, 32, 3)
    with pytest.raises(BundleError, match="text_encoder has no output 'penultimate_hidden_state'; it has last_hidden"):
        pipe("a red apple", steps=1, clip_skip=1)


def test_a_text_is_encoded_once(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that come again, in whatever role, do not run the text encoder; clip_skip makes another state of them."""
    with (
        Pipeline.load(tiny_bundles["sd1"], threads=1) as pipe,
        Pipeline.load(tiny_bundles["sd1"], threads=1, prompt_cache=0) as forgetful,
    ):
        calls: dict[str, list[int]] = {}
        for name in ("text_encoder", "unet_prompt"):
            engine = pipe.engines[name]
            calls[name] = []

            def count(feeds: Mapping[str, Array], run: Any = engine.run, seen: list[int] = calls[name]) -> Any:
                seen.append(len(next(iter(feeds.values()))))
                return run(feeds)

            monkeypatch.setattr(engine, "run", count)
        options: dict[str, Any] = {"steps": 2, "seed": 1, "guidance": 4, "sampler": "euler"}
        for prompt, negative, skip in (
            ("a red apple", "", 0),
            ("a rocket", "", 0),
            ("a red apple", "a rocket", 0),
            ("a red apple", "a red apple", 0),
            ("a red apple", "", 1),
        ):
            received = pipe(prompt, negative_prompt=negative, clip_skip=skip, **options).latents
            expected = forgetful(prompt, negative_prompt=negative, clip_skip=skip, **options).latents
            np.testing.assert_array_equal(received, expected, err_msg="the cache shows")
        assert calls == {"text_encoder": [1] * 4, "unet_prompt": [1] * 4}


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB"])
def test_a_wrong_size_of_the_cache_is_refused(tiny_bundles: dict[str, Path], size: Any) -> None:
    """The cache takes a whole number of bytes, 0 or more."""
    with pytest.raises(InvalidRequestError, match=r"prompt_cache is .*, expected (a whole number|0 or more bytes)"):
        Pipeline.load(tiny_bundles["sd1"], prompt_cache=size)
