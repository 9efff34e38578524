"""The reporter that says nothing takes every event of a build."""

from __future__ import annotations

import inspect

import pytest

from latentrt.exporter.progress import Reporter, Silent


def test_silence_takes_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    """It has each method of the protocol with the same parameters, and prints nothing."""
    events = {name for name, each in vars(Reporter).items() if inspect.isfunction(each) and not name.startswith("_")}
    assert events == {"stage", "progress", "result"}
    for name in events:
        assert inspect.signature(getattr(Silent, name)) == inspect.signature(getattr(Reporter, name))
    silent: Reporter = Silent()
    silent.stage("unet")
    silent.progress("Building", 1, 2)
    silent.result("80 dB")
    assert capsys.readouterr() == ("", "")
