"""The rounds of a contest for a ``job``: samples, failures of single contenders, and runs that end early."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.contest import rounds as module
from latentrt.benchmarks.contest.contenders import OURS, PEERS, Contender
from latentrt.benchmarks.contest.job import Job
from latentrt.benchmarks.contest.rounds import Contest, Settings

pytestmark = pytest.mark.usefixtures("fake_command")


def fake(name: str, seconds: float = 0.001, **options: Any) -> Contender:
    return Contender(name, name.title(), OURS, options={"seconds": seconds, **options})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(None, tmp_path, tmp_path, "a red apple", "", 7, 3, "euler", 4.0, 16, 16, 1, 0, "cpu")


def held(job: Job, folder: Path, contenders: Sequence[Contender], **settings: Any) -> Contest:
    return Contest(job, contenders, Settings(**settings), folder=folder, peers=folder)


def test_every_contender_gets_its_samples(job: Job, tmp_path: Path) -> None:
    """Each round has one image of each, with its stages; batches are measured beside; the control runs along."""
    contest = held(job, tmp_path, [fake("slow", 0.004), fake("fast")], rounds=3, batches=(2,))
    contest.run()
    slow, fast = contest.entries
    assert (slow.state, fast.state) == ("measured", "measured")
    assert slow.total == pytest.approx([0.014] * 3)
    assert fast.step == [[0.001] * 3] * 3
    assert fast.stages == {"text_encoder": [0.001] * 3, "prompt": [], "schedule": [], "vae_decoder": [0.001] * 3}
    assert fast.batches == {2: [pytest.approx(0.008)] * 3}
    assert len(contest.control) == contest.rounds_done == 3
    assert slow.cold is not None
    assert slow.cold.process_to_picture > slow.cold.first_picture
    assert slow.peak_rss >= slow.loaded_rss > 0
    assert slow.picture is not None
    assert slow.picture.is_file()
    assert contest.missing() == []


def test_a_contender_that_is_killed_keeps_what_it_had(job: Job, tmp_path: Path) -> None:
    """The others go on, and the report says in how many rounds it took part and how it ended."""
    contenders = [fake("killed", killed_at=4), fake("sound")]
    contest = held(job, tmp_path, contenders, rounds=4, warm_up=1)
    contest.run()
    killed, sound = contest.entries
    assert (killed.state, len(killed.total)) == ("partial", 1)
    assert (sound.state, len(sound.total)) == ("measured", 4)
    assert contest.missing() == [
        "Killed took part in 1 of 4 rounds: its process ended by SIGKILL; its last line was: about to end"
    ]


WRONG = [
    ({"unsupported": "it has no such sampler"}, "unavailable", "it has no such sampler"),
    ({"fails": "bad weights"}, "failed", "ValueError: bad weights"),
    ({"killed_at": 1}, "failed", "its process ended by SIGKILL; its last line was: about to end"),
    ({"raises_at": 1}, "failed", "RuntimeError: the kernel gave up"),
    ({"hangs_at": 1}, "failed", "gave no answer within 5 s and was ended"),
]


def test_what_goes_wrong_at_first_is_the_contenders_result(job: Job, tmp_path: Path) -> None:
    """It is told in one sentence, and takes nobody with it."""
    broken = [fake(f"broken-{number}", **options) for number, (options, *_) in enumerate(WRONG)]
    contest = held(job, tmp_path, [*broken, fake("sound")], rounds=1, timeout=5.0)
    contest.run()
    assert [(entry.state, entry.reason) for entry in contest.entries[:-1]] == [tuple(wrong[1:]) for wrong in WRONG]
    assert contest.entries[-1].state == "measured"
    assert len(contest.missing()) == len(WRONG)


def test_models_that_do_not_fit_together_are_opened_for_each_turn(job: Job, tmp_path: Path) -> None:
    """Each turn has a process of its own, which first draws one step that does not count."""
    contest = held(job, tmp_path, [fake("a"), fake("b", killed_at=3)], rounds=2, residency="reloaded", batches=(2,))
    contest.run()
    assert [entry.state for entry in contest.entries] == ["measured", "measured"]
    assert [len(entry.total) for entry in contest.entries] == [2, 2]


def test_little_memory_makes_them_be_opened_for_each_turn(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another contender of the largest size would not fit, nobody stays in memory."""
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 20})())
    contest = held(job, tmp_path, [fake("a"), fake("b")], rounds=1)
    contest.run()
    assert contest.residency == "reloaded"
    assert [entry.state for entry in contest.entries] == ["measured", "measured"]


def test_a_budget_shrinks_rounds_and_hides_nobody(job: Job, tmp_path: Path) -> None:
    """One round is always gone, with everybody in it."""
    contest = held(job, tmp_path, [fake("a"), fake("b")], rounds=50, budget=0.001)
    contest.run()
    assert [len(entry.total) for entry in contest.entries] == [1, 1]
    assert contest.missing() == ["1 of 50 rounds took place"]


def test_an_interrupt_keeps_what_was_measured(job: Job, tmp_path: Path) -> None:
    """The contenders' processes are ended, and the samples so far are there."""
    contest = held(job, tmp_path, [fake("a", 0.01)], rounds=1000)

    def interrupt() -> None:
        while contest.rounds_done < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        contest.run()
    assert 2 <= len(contest.entries[0].total) < 1000
    assert contest._children == {}


def test_compiled_models_are_told_from_a_start_without(job: Job, tmp_path: Path) -> None:
    """Where the bundle keeps compiled models, another start without them says what compiling takes."""
    contest = held(job, tmp_path, [fake("ov", engine="openvino", engine_cache="read")], rounds=1)
    contest.run()
    (entry,) = contest.entries
    assert entry.cold is not None
    assert (entry.cold.compile, entry.cold.compile_cached) == (0.02, 0.02)


def test_peers_need_the_source(job: Job, tmp_path: Path) -> None:
    """Without it they are unavailable or failed, with a sentence that names the flag."""
    contest = held(job, tmp_path, [PEERS[0]], rounds=1)
    contest.run()
    assert "--source" in (contest.entries[0].reason or "")
