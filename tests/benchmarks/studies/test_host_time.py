"""The benchmark of the host's share of a step."""

from __future__ import annotations

import pytest

from latentrt.benchmarks.studies.host_time import main, measure


def test_host_time_of_a_steered_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Two ControlNets and an IP-Adapter fit together at the sizes of Stable Diffusion 1.5, and take milliseconds."""
    samples = measure(2, ip_adapter=True, steps=5)
    assert len(samples) == 5
    assert min(samples) < 0.01, "a limit for machines that are busy; the manual has the figures"
    assert main(["--controlnets", "1", "--steps", "2"]) == 0
    assert "host time of a step: median" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--controlnets", "9"])
