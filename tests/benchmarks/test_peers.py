"""Programs of the peers: what they say on the wire, their environments, what they draw."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.peers import diffusers_peer, drawing, environments, keeping, optimum_onnx_peer, wire
from latentrt.engines.errors import LatentRTError, OutputError

PEERS = Path(wire.__file__).parent
JOB = {
    "bundle": None,
    "prompt": "a red apple",
    "negative_prompt": "a green leaf",
    "seed": 7,
    "steps": 2,
    "sampler": "euler",
    "guidance": 4.0,
    "width": 32,
    "height": 32,
    "images": 1,
    "threads": 1,
    "device": "cpu",
    "options": {},
}
FAKE = '''
"""A contender that misbehaves as libraries do."""
import os, subprocess, sys
from . import wire
from .conversion import converted
from pathlib import Path

class OutOfMemoryError(RuntimeError):
    pass

class Contender:
    def open(self, job):
        if "source" in job:
            made = converted("fake_peer", Path(job["source"]), Path(job["workspace"]), {"fake": "1"})
            return {"prepare_seconds": made.seconds, "notes": made.notes}
        print("library says hello")
        os.system("echo so does its program; cat")
        return {"notes": [job["say"], sys.path[0]]}

    def draw(self, request, job):
        kind = request["picture"]
        if kind == "unsupported":
            raise wire.UnsupportedError("it cannot do this")
        if kind == "memory":
            raise MemoryError
        if kind == "device memory":
            raise OutOfMemoryError("CUDA ran out")
        if kind == "allocator":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        if kind == "hog":
            return {"total": len(bytearray(os.urandom(64 << 20)))}
        raise ValueError("a message\\nof two lines")

    def close(self):
        pass

def convert(source, target):
    print("an exporter says hello")
    if not (source / "model").is_file():
        raise ValueError("no model")
    (target / "converted").write_bytes(b"x")
    return ["it was adapted"]
'''


class Child:
    """A contender's program, from the harness's side."""

    def __init__(self, folder: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "launch.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peers' folder with a fake peer in it."""
    folder = tmp_path_factory.mktemp("peers")
    for name in ("__init__", "launch", "wire", "conversion", "keeping"):
        shutil.copy(PEERS / f"{name}.py", folder)
    (folder / "fake_peer.py").write_text(FAKE)
    return folder


@pytest.fixture
def child(fake_folder: Path) -> Iterator[Child]:
    """The fake contender, running."""
    child = Child(fake_folder, "fake_peer")
    yield child
    child.end()


def test_what_libraries_print_and_read_is_not_on_the_wire(child: Child, fake_folder: Path) -> None:
    """Answers are alone on standard output, requests are read by nobody else, and ``close`` ends the program."""
    answer = child.ask("open", job={"say": "ä"})
    assert answer["ok"] is True
    assert answer["notes"][0] == "ä"
    assert Path(answer["notes"][1]) != fake_folder
    assert answer["peak_rss_bytes"] >= answer["rss_bytes"] > 1 << 20
    assert answer["device_peak_bytes"] is None
    assert child.ask("close")["ok"] is True
    output, error = child.process.communicate(timeout=30)
    assert (output, child.process.returncode) == ("", 0)
    assert "library says hello" in error
    assert "so does its program" in error


@pytest.mark.parametrize(
    ("picture", "kind", "message"),
    [
        ("unsupported", "unsupported", "it cannot do this"),
        ("memory", "memory", "MemoryError: MemoryError"),
        ("device memory", "memory", "OutOfMemoryError: CUDA ran out"),
        ("allocator", "memory", "RuntimeError: DefaultCPUAllocator: can't allocate memory"),
        ("anything", "failed", "ValueError: a message of two lines"),
    ],
)
def test_an_error_is_an_answer(
    picture: str, kind: str, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a draw raises is answered in one sentence, by kind, and the contender goes on serving."""
    requests = "".join(json.dumps({"do": "draw", "picture": each}) + "\n" for each in (picture, "anything"))
    namespace: dict[str, Any] = {"__package__": wire.__package__, "__name__": f"{wire.__package__}.fake_peer"}
    exec(FAKE, namespace)
    read, write = os.pipe()
    os.write(write, requests.encode())
    os.close(write)
    kept = [os.dup(descriptor) for descriptor in (0, 1)]
    interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    try:
        os.dup2(read, 0)
        assert wire.serve(namespace["Contender"]) == 0, "it ends where requests do"
    finally:
        os.dup2(kept[0], 0)
        os.dup2(kept[1], 1)
        signal.signal(signal.SIGINT, interrupt)
        for descriptor in (read, *kept):
            os.close(descriptor)
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["ok"] for answer in answers] == [False, False]
    assert answers[0]["kind"] == kind
    assert answers[0]["error"].startswith(message)
    assert answers[1]["error"] == "ValueError: a message of two lines"


def test_the_programs_memory_is_its_own(child: Child) -> None:
    """The peak does not begin at that of the process that started the program, and follows what it takes."""
    ballast = b"x" * (256 << 20)
    before = child.ask("open", job={"say": ""})["peak_rss_bytes"]
    assert before < len(ballast)
    after = child.ask("draw", picture="hog")
    assert after["total"] == 64 << 20
    assert after["peak_rss_bytes"] - before >= 64 << 20
    del ballast


def test_an_interrupt_is_left_to_the_harness(child: Child) -> None:
    """A Ctrl-C does not end a contender; the end of its input does, with status 0."""
    child.ask("open", job={"say": ""})
    child.process.send_signal(signal.SIGINT)
    assert child.ask("draw", picture="anything")["kind"] == "failed"
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(timeout=30) == 0


def test_a_conversion_is_made_once(child: Child, tmp_path: Path) -> None:
    """It is kept in the workspace, made again when the checkpoint changes, and its failure is an answer."""
    source = tmp_path / "source"
    source.mkdir()
    job = {"source": str(source), "workspace": str(tmp_path / "workspace")}
    assert child.ask("open", job=job)["error"] == "RuntimeError: converting the checkpoint failed: ValueError: no model"
    (source / "model").write_text("first")
    first = child.ask("open", job=job)
    assert first["ok"] is True
    assert first["prepare_seconds"] > 0
    assert first["notes"] == ["it was adapted"]
    again = child.ask("open", job=job)
    assert (again["prepare_seconds"], again["notes"]) == (None, ["it was adapted"])
    (source / "model").write_text("the second")
    assert child.ask("open", job=job)["prepare_seconds"] > 0


def test_a_conversion_ends_with_the_program(fake_folder: Path, tmp_path: Path) -> None:
    """Killing the program that waits for a conversion leaves no process that converts."""
    slow = FAKE.replace("(target /", "import time; time.sleep(600); (target /")
    (fake_folder / "slow_peer.py").write_text(slow.replace('converted("fake_peer"', 'converted("slow_peer"'))
    source = tmp_path / "source"
    source.mkdir()
    (source / "model").touch()
    child = Child(fake_folder, "slow_peer")
    assert child.process.stdin is not None
    job = {"source": str(source), "workspace": str(tmp_path)}
    child.process.stdin.write(json.dumps({"do": "open", "job": job}) + "\n")
    child.process.stdin.flush()
    assert child.process.stderr is not None
    assert child.process.stderr.readline() == "an exporter says hello\n", "it converts"
    child.process.kill()
    assert child.process.stderr.read() == "", "nobody holds standard error any more"
    child.end()
    assert not list(tmp_path.glob("slow-peer-*/" + keeping.MARKER))


def test_a_folder_is_made_once_though_many_ask(tmp_path: Path) -> None:
    """Of several that want a folder at a time one makes it, and the others wait until it is whole."""
    makes, seen = [], []

    def make(folder: Path) -> None:
        makes.append(folder)
        time.sleep(0.1)
        (folder / "file").touch()

    def ask() -> None:
        seconds = keeping.keep(tmp_path / "kept", make)
        seen.append((seconds is None, (tmp_path / "kept" / "file").exists()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makes) == 1
    assert sorted(seen) == [(False, True), (True, True), (True, True), (True, True)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_folder_is_gone(tmp_path: Path, error: type[BaseException]) -> None:
    """What an interrupted maker wrote is removed, and what a killed one left is made anew."""

    def stop(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    with pytest.raises(error):
        keeping.keep(tmp_path / "kept", stop)
    assert not (tmp_path / "kept").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "half").touch()
    assert keeping.keep(tmp_path / "kept", lambda folder: (folder / "whole").touch()) is not None
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"whole", keeping.MARKER}
    assert keeping.keep(tmp_path / "kept", stop) is None


def write_wheel(folder: Path) -> Path:
    """A wheel of one module, of which the metadata asks for a package that nobody has."""
    path = folder / "latentrt_fake-1.0-py3-none-any.whl"
    info = "latentrt_fake-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("latentrt_fake.py", "ANSWER = 42\n")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: latentrt-fake\nVersion: 1.0\nRequires-Dist: latentrt-nobody-has-this==9\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_an_environment_holds_its_list_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made of the list alone, kept, found again, and made again when it is incomplete or the list changes."""
    lists = tmp_path / "requirements"
    lists.mkdir()
    monkeypatch.setattr(environments, "REQUIREMENTS", lists)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (lists / "fake.txt").write_text(f"# why\n--no-index\nlatentrt-fake @ {write_wheel(tmp_path).as_uri()}\n")
    python = environments.environment("fake")
    folder = python.parent.parent
    assert folder.parent == tmp_path / "cache" / "latentrt" / "peers"
    program = "import latentrt_fake, importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["latentrt-fake"]
    inode = folder.stat().st_ino
    (lists / "fake.txt").write_text((lists / "fake.txt").read_text().replace("why", "a better reason"))
    assert environments.environment("fake") == python
    assert folder.stat().st_ino == inode
    python.unlink()
    python.symlink_to(tmp_path / "a Python that was removed")
    assert environments.environment("fake").resolve() == Path(sys.executable).resolve()
    (lists / "fake.txt").write_text("--no-index\n")
    with pytest.raises(environments.PeerUnavailableError, match=r"there is no list of packages for 'other', .* fake"):
        environments.environment("other")
    assert environments.environment("fake") != python


def test_a_package_that_cannot_be_had_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is pip's last line that tells, and no environment is left."""
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "fake.txt").write_text("--no-index\nlatentrt-nobody-has-this==9\n")
    with pytest.raises(environments.PeerUnavailableError) as caught:
        environments.environment("fake", tmp_path / "root")
    assert isinstance(caught.value, LatentRTError)
    assert str(caught.value).endswith("No matching distribution found for latentrt-nobody-has-this==9")
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the environment of 'fake' could not be written"):
        environments.environment("fake", tmp_path / "file")


@pytest.mark.parametrize("path", sorted(environments.REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_list_is_pinned(path: Path) -> None:
    """A list says what it is for, and gives the exact version of every package once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 and pin[1] and pin[1][0].isdigit() and "+" not in pin[1] for pin in pins)
    assert len({name.lower().replace("_", "-") for name, _ in pins}) == len(pins)


def psnr(picture: Any, expected: Any) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB."""
    error = np.mean((picture.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture
def threads() -> Iterator[None]:
    """PyTorch's number of threads is put back: a contender has a process to itself, but not here."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_diffusers_draws_what_diffusers_draws(tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    """Its program draws the pipeline's own picture, as many as asked for, and tells the seconds of the stages."""
    import diffusers
    import torch

    contender = diffusers_peer.Contender()
    job = JOB | {"source": str(tiny_sources["sd1"]), "workspace": str(tmp_path)}
    with pytest.raises(wire.UnsupportedError, match="'flow-euler'"):
        contender.open(job | {"sampler": "flow-euler"})
    opened = contender.open(job)
    assert torch.get_num_threads() == 1
    assert opened["versions"]["diffusers"] == diffusers.__version__
    assert opened["disk_bytes"] == sum(file.stat().st_size for file in tiny_sources["sd1"].rglob("*.safetensors"))
    answer = contender.draw({"picture": str(tmp_path / "x.npy"), "images": None, "steps": None}, job)
    assert len(answer["steps"]) == 2
    assert min(answer["steps"]) > 0
    stages = answer["text_encoder"] + sum(answer["steps"]) + answer["vae_decoder"]
    assert 0.5 * answer["total"] < stages < answer["total"]
    two = contender.draw({"picture": str(tmp_path / "two.npy"), "images": 2, "steps": 3}, job)
    assert len(two["steps"]) == 3
    assert json.loads(json.dumps([opened, answer, two])) == [opened, answer, two]
    contender.close()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_sources["sd1"], local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for name, images, steps in (("x", 1, 2), ("two", 2, 3)):
        expected = pipe(
            "a red apple",
            negative_prompt="a green leaf",
            width=32,
            height=32,
            num_inference_steps=steps,
            guidance_scale=4.0,
            num_images_per_prompt=images,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images
        picture = np.load(tmp_path / f"{name}.npy")
        assert (picture.dtype, picture.shape) == (np.uint8, (images, 32, 32, 3))
        assert psnr(picture, np.round(expected * 255)) > 45


def test_samplers_are_those_of_the_parity_tests() -> None:
    """Every sampler has a class of diffusers' that takes the config of another, or is refused."""
    import diffusers

    from latentrt.runtime.samplers import SAMPLERS

    config = diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").config
    assert set(drawing.SCHEDULERS) < set(SAMPLERS)
    for name, (kind, settings) in drawing.SCHEDULERS.items():
        made = drawing.scheduler(name, config)
        assert type(made).__name__ == kind
        assert {key: made.config[key] for key in settings} == dict(settings)
        assert made.config.prediction_type == "v_prediction"
    with pytest.raises(wire.UnsupportedError, match="'flow-euler'"):
        drawing.scheduler("flow-euler", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "option dtype is 'int8', expected one of 'fp32'"),
        ({"type": "fp32"}, "option 'type' is unkn"),
    ],
)
def test_options_that_a_peer_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    """An option or a value that is unknown is never passed over."""
    with pytest.raises(wire.UnsupportedError, match=message):
        optimum_onnx_peer.Contender().open({**JOB, "options": options})


def test_transformers_4_is_given_what_it_reads(emoji_source: Path, tmp_path: Path) -> None:
    """The copy has the same vocabulary, merges and weights under the names of old; the rest are links."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    target = tmp_path / "copy"
    assert len(optimum_onnx_peer.adapt(emoji_source, target)) == 2
    files = [str(target / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer.from_file(str(emoji_source / "tokenizer" / "tokenizer.json"))
    read = BPE.from_file(*files, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    text = "a red apple, 7 elephants"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.model = read
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    before = load_file(emoji_source / "text_encoder" / "model.safetensors")
    after = load_file(target / "text_encoder" / "model.safetensors")
    assert set(after) == {f"text_model.{name}" for name in before}
    assert all(np.array_equal(after[f"text_model.{name}"], tensor) for name, tensor in before.items())
    assert (target / "unet" / "config.json").resolve() == (emoji_source / "unet" / "config.json").resolve()
    assert optimum_onnx_peer.adapt(target, tmp_path / "again") == []


def test_code_of_an_interrupted_compilation_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile kept is found again, unless a draw did not end; two processes never share a folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")

    def open_cache() -> tuple[diffusers_peer.CompileCache, str, Path]:
        cache = diffusers_peer.CompileCache(tmp_path, "key")
        return cache, cache.open(), Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    def end_process(cache: diffusers_peer.CompileCache) -> None:
        assert cache._lock is not None
        os.close(cache._lock)

    first, note, folder = open_cache()
    assert "its cache was empty" in note
    other, note, apart = open_cache()
    assert "its cache was empty" in note
    assert folder.parent.parent == tmp_path
    assert not apart.is_relative_to(tmp_path)
    end_process(other)
    with first.in_use():
        folder.mkdir()
        (folder / "code.so").touch()
    end_process(first)
    second, note, again = open_cache()
    assert "held code from before" in note
    assert (again / "code.so").exists()
    with pytest.raises(KeyboardInterrupt), second.in_use():
        raise KeyboardInterrupt
    end_process(second)
    third, note, last = open_cache()
    assert "its cache was empty" in note
    assert last == folder
    assert not last.exists()
    end_process(third)
