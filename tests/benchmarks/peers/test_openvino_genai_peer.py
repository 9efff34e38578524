"""What is asked of OpenVINO GenAI, and what is refused before it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from latentrt.benchmarks.peers import openvino_genai_peer as peer
from latentrt.benchmarks.peers.wire import UnsupportedError

JOB = {"device": "cpu", "sampler": "euler", "options": {}}

# Members of openvino_genai.Scheduler.Type in openvino-genai 2026.4.1, with their values.
TYPES = {
    "AUTO": 0,
    "LCM": 1,
    "DDIM": 2,
    "EULER_DISCRETE": 3,
    "FLOW_MATCH_EULER_DISCRETE": 4,
    "PNDM": 5,
    "EULER_ANCESTRAL_DISCRETE": 6,
    "LMS_DISCRETE": 2,
}


def test_each_sampler_is_a_scheduler_of_its_own() -> None:
    """Every sampler names a type that GenAI has, and no two name one that computes the same."""
    values = [TYPES[name] for name in peer.SCHEDULERS.values()]
    assert len(set(values)) == len(values)
    assert TYPES["AUTO"] not in values


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"sampler": "dpmpp-2m"}, {}, "has no sampler 'dpmpp-2m'"),
        ({"sampler": "lms"}, {}, "has no sampler 'lms'"),
        ({"device": "cuda"}, {}, "no CUDA devices"),
        ({"sampler": "lcm"}, {"prediction_type": "v_prediction"}, "predict epsilon"),
        ({"sampler": "euler-a"}, {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_what_it_has_not_got_is_unsupported(change: dict[str, Any], config: dict[str, Any], message: str) -> None:
    """Samplers, devices and kinds of model that it lacks are refused in a sentence, without the library."""
    peer.check_job(JOB, {})
    with pytest.raises(UnsupportedError, match=message):
        peer.check_job({**JOB, **change}, config)


def test_unknown_precision_is_unsupported() -> None:
    """A precision that is none of the three is refused before anything is imported."""
    with pytest.raises(UnsupportedError, match="precision is 'fp8', expected one of fp32, bf16, int8"):
        peer.Contender().open({**JOB, "options": {"precision": "fp8"}})


def test_scheduler_config_is_strict_json() -> None:
    """What diffusers writes as ``-Infinity``, which is not JSON, is left out, and all else is as it was."""
    config = json.loads(
        '{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "steps_offset": 1}'
    )
    text = json.dumps(peer.readable_config(config), allow_nan=False)
    assert json.loads(text) == {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}


@pytest.mark.parametrize("named_at_random", [False, True])
def test_conversion_is_complete_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_at_random: bool
) -> None:
    """A converted folder has GenAI's files and no copy of the checkpoint; weights drawn at random are a failure."""
    source, workspace = tmp_path / "source", tmp_path / "workspace"
    for part in ("text_encoder", "scheduler"):
        (source / part).mkdir(parents=True)
    (source / "scheduler" / "scheduler_config.json").write_text('{"steps_offset": 1, "lambda_min_clipped": -Infinity}')

    def convert(_name: str, command: list[str], _environment: dict[str, str]) -> str:
        assert command[command.index("--weight-format") + 1] == "fp16"
        assert (Path(command[command.index("--model") + 1]) / "scheduler").is_dir()
        (Path(command[-1]) / "scheduler").mkdir()
        (Path(command[-1]) / "unet").mkdir()
        return "those params were newly initialized" if named_at_random else "fine"

    monkeypatch.setattr(peer, "run_tool", convert)
    monkeypatch.setattr(peer, "versions", lambda *_: {"openvino": "1"})
    if named_at_random:
        with pytest.raises(RuntimeError, match="did not find all weights"):
            peer.converted_folder(source, workspace, "bf16")
        assert [path for path in workspace.iterdir() if path.is_dir()] == []
        return
    folder, converted = peer.converted_folder(source, workspace, "bf16")
    assert converted
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["scheduler", "unet"]
    assert peer.converted_folder(source, workspace, "bf16") == (folder, False)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["steps_offset"] == 1


def test_latents_have_the_shape_that_the_decoder_takes(emoji_source: Path) -> None:
    """Channels and factor are those of the decoder's weights: of its first convolution, and of its upsamplers."""
    channels, factor = peer.latent_shape(emoji_source)
    with safe_open(emoji_source / "vae" / "diffusion_pytorch_model.safetensors", "numpy") as weights:
        assert weights.get_slice("decoder.conv_in.weight").get_shape()[1] == channels
        upsamplers = [name for name in weights.keys() if name.endswith("upsamplers.0.conv.weight")]  # noqa: SIM118
    assert 2 ** len(upsamplers) == factor


def test_what_genai_calls_unsupported_is_unsupported() -> None:
    """GenAI's refusal of a setting is told as one, in its words; its other errors stay what they are."""
    refusal = (
        "Check '!m_config.clip_sample' failed at /a/openvino.genai/src/image_generation/schedulers/ddim.cpp:180:"
        "\n"
        "Parameter 'clip_sample' is not supported. Please, add support.\n"
    )
    translated = peer._translated(RuntimeError(refusal))
    assert isinstance(translated, UnsupportedError)
    assert "Parameter 'clip_sample' is not supported" in str(translated)
    assert "/a/openvino.genai" not in str(translated)
    other = RuntimeError("Failed to open unet/openvino_model.xml")
    assert peer._translated(other) is other
