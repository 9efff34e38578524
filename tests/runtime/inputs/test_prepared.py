"""Requests are prepared before any engine runs: plans, tokenised texts, records, and what one size does not allow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle, Pipeline, Tiling
from latentrt.runtime.components.engine_choice import FixedSize
from latentrt.runtime.families import family_of
from latentrt.runtime.inputs.batch import Batch
from latentrt.runtime.inputs.prepared import PreparedRequests, RequestPreparer
from latentrt.runtime.lora.reading import AppliedLora
from latentrt.runtime.output.kinds import OUTPUT_KINDS, ImageOutput
from latentrt.runtime.samplers import compile_plan
from latentrt.runtime.text.textual_inversion import Embeddings


class Silent(ImageOutput):
    """Images without previews."""

    name, previews = "still", False


@pytest.fixture
def preparer(bundle: Bundle, pipe: Pipeline) -> RequestPreparer:
    """Of the tiny SD 1.x bundle, for any size."""
    return RequestPreparer(family_of(bundle.manifest), OUTPUT_KINDS["image"], pipe.tokenizers, Embeddings(), None)


def prepare(preparer: RequestPreparer, pipe: Pipeline, prompt: str = "a leaf", **options: Any) -> PreparedRequests:
    return preparer.prepare(Batch.single, prompt, {"seed": 7, "sampler": "euler", **options}, pipe.loop)


def test_plan_and_texts_are_the_requests(preparer: RequestPreparer, pipe: Pipeline) -> None:
    """The unconditional text comes first where guidance is on, and is left out where it is not."""
    found = prepare(preparer, pipe, steps=3, guidance=4.0, negative_prompt="blurry")
    expected = compile_plan("euler", pipe.manifest.scheduler, 3)
    np.testing.assert_array_equal(found.plan.timesteps, expected.timesteps)
    tokenizer = pipe.tokenizers["tokenizer"]
    ((negative, prompt),) = found.texts
    np.testing.assert_array_equal(negative.tokens["text_encoder"][0], tokenizer.encode("blurry"))
    np.testing.assert_array_equal(prompt.tokens["text_encoder"][0], tokenizer.encode("a leaf"))
    ((alone,),) = prepare(preparer, pipe, guidance=1.0).texts
    np.testing.assert_array_equal(alone.tokens["text_encoder"][0], tokenizer.encode("a leaf"))
    assert found.timings.schedule > 0
    assert found.timings.text_encoder > 0


def test_loras_are_recorded(preparer: RequestPreparer, pipe: Pipeline) -> None:
    """Every request says which were on."""
    loras = (AppliedLora("a.safetensors", "f" * 64, 0.5),)
    found = preparer.prepare(Batch.create, ["a", "b"], {}, pipe.loop, loras)
    assert [request.loras for request in found.batch.requests] == [loras, loras]
    assert len(found.texts) == 2


def test_no_engine_is_called(preparer: RequestPreparer, pipe: Pipeline, engines: dict[str, Any]) -> None:
    """Whatever is asked for, engines wait until the first step."""
    prepare(preparer, pipe)
    assert all(engine.calls == [] for engine in engines.values())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"width": 64}, "width is 64, and this pipeline was loaded for 48 alone"),
        ("a", {"images": 2}, "images is 2, and this pipeline was loaded for 1 alone"),
        ("a", {"vae_tiling": Tiling(16)}, "decoder was loaded for 48x32 alone, and tiles of 16 are asked for"),
        ("a red apple, " * 60, {"prompt_syntax": "long"}, "loaded for texts of one chunk of tokens alone"),
    ],
)
def test_one_size_is_all_that_its_engines_take(
    preparer: RequestPreparer, pipe: Pipeline, prompt: str, options: dict[str, Any], message: str
) -> None:
    """The size is filled in, and other sizes, small tiles and long texts are refused; without it all of them pass."""
    fixed = dataclasses.replace(preparer, fixed_size=FixedSize(48, 32, 1))
    (request,) = prepare(fixed, pipe).batch.requests
    assert (request.width, request.height, request.images) == (48, 32, 1)
    with pytest.raises(InvalidRequestError, match=message):
        prepare(fixed, pipe, prompt, **options)
    prepare(preparer, pipe, prompt, **options)


def test_an_output_without_previews_says_so(preparer: RequestPreparer) -> None:
    """Images have previews, another kind may have none."""
    preparer.check_previews()
    with pytest.raises(InvalidRequestError, match="there are no previews of still; leave on_preview out"):
        dataclasses.replace(preparer, kind=Silent()).check_previews()
