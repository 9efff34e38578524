"""Builds before a contest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.contest import builds
from latentrt.benchmarks.contest.contenders import PEERS, ours
from latentrt.benchmarks.contest.job import Job
from latentrt.engines.errors import LatentRTError


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, tmp_path, tmp_path, "a red apple", "", 7, 3, "euler", 4.0, 16, 24, 2, 0, "cpu")


def test_each_of_ours_is_built_and_timed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has engine, precision and size; a failed build and one that had nothing to do have no time."""
    commands: list[list[str]] = []
    answers = [
        (0, json.dumps({"exported": ["unet"], "engines": [], "seconds": 12.5}), ""),
        (1, "", "a line\nthe disk is full\n"),
        (0, json.dumps({"exported": [], "engines": [{"reused": True}], "seconds": 0.1}), ""),
    ]

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, *answers[len(commands) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    messages: list[str] = []
    contenders = [ours("openvino", "bf16"), PEERS[0], ours("openvino", "fp32"), ours("onnxruntime", "fp32")]
    assert builds.build(job, contenders, messages.append) == {"latentrt-openvino-bf16": 12.5}
    size = ["--width", "16", "--height", "24", "--batch", "2"]
    assert [command[-10:-6] for command in commands] == [
        ["--engine", "openvino", "--precision", "bf16"],
        ["--engine", "openvino", "--precision", "fp32"],
        ["--engine", "onnxruntime", "--precision", "fp32"],
    ]
    assert all(command[-6:] == size for command in commands)
    assert "LatentRT, OpenVINO fp32: not built: the disk is full" in messages
    assert messages[-1] == "LatentRT, ONNX Runtime fp32: built before"


def test_a_build_needs_the_source(job: Job) -> None:
    """Without it the message names the flag."""
    with pytest.raises(LatentRTError, match="--source"):
        builds.build(dataclasses.replace(job, source=None), [], lambda _: None)
