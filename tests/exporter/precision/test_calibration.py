"""Calibration: prompts from files, and the calls that are recorded while images are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.precision.calibration import PROMPTS, Calibration, read_prompts, record
from latentrt.exporter.precision.reduce import Quantization
from latentrt.exporter.verification.emulate import emulated
from latentrt.runtime.bundle.reader import Bundle


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    """One a line; blank lines and comments are left out; what is no list of prompts is refused in one sentence."""
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\n  a red apple \nein Haus, schön\n", encoding="utf-8")
    assert read_prompts(path) == ("a red apple", "ein Haus, schön")
    for content, words in (
        (b"# nothing\n", "holds 0 prompts"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a\n" * 1001, "1001 prompts"),
        (b"a" * (1 << 20) + b"b", "more than"),
        (b"a" * (1 << 20) + "ö".encode(), "more than"),
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=words):
            read_prompts(path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("change", [{"prompts": ()}, {"steps": 0}, {"checked": 0}, {"recorded": True}])
def test_a_calibration_that_draws_nothing_is_refused(change: dict[str, object]) -> None:
    """Prompts, steps and pictures are at least one."""
    with pytest.raises(InvalidRequestError):
        Calibration(**change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="least SQNR"):
        Quantization(float("nan"))


@pytest.mark.heavy
def test_recording_covers_prompts_timesteps_and_both_halves(emoji_bundle: Path) -> None:
    """Kept calls come from every prompt, at timesteps spread over the run, with two rows a sample."""
    calibration = Calibration(PROMPTS[:3], steps=6, recorded=6)
    with emulated(Bundle.open(emoji_bundle), PORTABLE.name, rounded=False) as (pipeline, paths):
        recording = record(pipeline, calibration)
    assert {name: len(calls) for name, calls in recording.calls.items()} == {
        "text_encoder": 6,  # each prompt and the empty negative one
        "unet_prompt": 6,
        "unet_schedule": 3,
        "unet_step": 6,
        "vae_decoder": 3,
    }
    steps = recording.calls["unet_step"]
    assert len({float(call["input_scale"][0]) for call in steps} | {call["update"].tobytes() for call in steps}) >= 5
    assert all(len(call["rows"]) == 2 for call in steps)
    assert recording.images.shape == (3, 64, 64, 3)
    assert not [path for path in paths["unet_step"].parent.iterdir() if path.name.startswith(".")]
