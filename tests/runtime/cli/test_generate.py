"""``latentrt generate``: pictures on disk, and every way to fail in one line that leaves no file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.store import EngineStore
from latentrt.runtime import Pipeline, Tiling
from latentrt.runtime.cli import main
from latentrt.runtime.components import engine_choice
from latentrt.runtime.images.png import read_parameters

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tiny_bundles: dict[str, Path]) -> Path:
    """The tiny SD 1.x bundle, not to be changed."""
    return tiny_bundles["sd1"]


def generate(bundle: Path, output: Path, *options: str, prompt: str = "a red apple") -> int:
    return main(
        ["generate", str(bundle), prompt, "--output", str(output), "--steps", "1", "--sampler", "euler", *options]
    )


def assert_fails(capsys: Captured, status: int, expected: int, message: str) -> None:
    """One line on stderr that holds ``message``, nothing on stdout."""
    out, err = capsys.readouterr()
    assert status == expected
    assert out == ""
    assert err.startswith("latentrt: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_picture_is_the_pipelines(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """The file holds what Pipeline draws, and the line on stdout names it; stderr stays empty."""
    options = ("--seed", "7", "--guidance", "3", "--width", "48", "--height", "24", "--negative-prompt", "a leaf")
    assert generate(bundle, tmp_path / "o.png", *options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{tmp_path / 'o.png'}: 48x24, seed 7, euler, 1 steps of ")
    with Pipeline.load(bundle) as pipe:
        expected = pipe(
            "a red apple", negative_prompt="a leaf", steps=1, sampler="euler", seed=7, guidance=3, width=48, height=24
        )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), expected.images[0])


def test_the_engine_and_the_reason_are_told(
    bundle: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of its own says which engine auto took and why; JSON also says what was passed over."""
    monkeypatch.setattr(engine_choice, "cuda_devices", lambda: ())
    assert generate(bundle, tmp_path / "o.png") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "engine: onnxruntime (the fastest on a CPU)"
    assert generate(bundle, tmp_path / "o.png", "--json") == 0
    choice = json.loads(capsys.readouterr().out)["engine_choice"]
    assert (choice["name"], choice["reason"]) == ("onnxruntime", "the fastest on a CPU")
    assert choice["passed_over"]["tensorrt"] == "no CUDA device was found"


def test_tiles_and_small_batches(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """The tiles are those that were described, and are told in the file and as JSON."""
    options = ("--seed", "7", "--width", "64", "--height", "48", "--images", "3", "--max-batch", "2", "--json")
    tiles = ("--vae-tile", "32", "--vae-tile-overlap", "12", "--vae-tile-edges", "cut")
    assert generate(bundle, tmp_path / "o.png", *options, *tiles) == 0
    told = json.loads(capsys.readouterr().out)["request"]["vae_tiling"]
    assert told == {"size": 32, "overlap": 12, "edges": "cut"}
    assert "Vae tiling: 32 overlap 12 cut" in str(read_parameters(tmp_path / "o.png"))
    with Pipeline.load(bundle, max_batch=2) as pipe:
        asked: dict[str, Any] = {"steps": 1, "sampler": "euler", "seed": 7, "width": 64, "height": 48, "images": 3}
        expected = pipe("a red apple", vae_tiling=Tiling(32, 12, "cut"), **asked)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png"))[:48, :64], expected.images[0])
    status = generate(bundle, tmp_path / "p.png", "--vae-tile-overlap", "12")
    assert_fails(capsys, 2, status, "give their size with --vae-tile")
    status = generate(bundle, tmp_path / "p.png", "--vae-tile", "7")
    assert_fails(capsys, 2, status, "the size of tiles is 7 pixels, expected a multiple of 2 from 16")
    assert not (tmp_path / "p.png").exists()


def test_compiled_models_and_a_fixed_size(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """OpenVINO's models are stored when asked for, and those of a fixed size draw the same picture."""
    options = ("--engine", "openvino", "--seed", "7", "--width", "48", "--images", "2")
    assert generate(tiny_bundle, tmp_path / "o.png", *options) == 0
    assert not (tiny_bundle / "engines").exists()
    assert generate(tiny_bundle, tmp_path / "p.png", *options, "--engine-cache", "write", "--fixed-size") == 0
    assert len(EngineStore(tiny_bundle / "engines").records()) == 5
    one, other = (np.asarray(Image.open(tmp_path / name), int) for name in ("o.png", "p.png"))
    assert np.abs(one - other).max() <= 1
    assert "engine: openvino (asked for)" in capsys.readouterr().out


def test_several_pictures_become_one_sheet(bundle: Path, tmp_path: Path) -> None:
    """Five pictures lie in rows of four, in order."""
    assert generate(bundle, tmp_path / "o.png", "--images", "5", "--seed", "7") == 0
    with Pipeline.load(bundle) as pipe:
        images = pipe("a red apple", steps=1, sampler="euler", seed=7, images=5).images
    pixels = np.asarray(Image.open(tmp_path / "o.png"))
    assert pixels.shape == (64, 128, 3)
    np.testing.assert_array_equal(pixels[:32, 96:], images[3])
    np.testing.assert_array_equal(pixels[32:, :32], images[4])


def test_the_file_says_how_it_was_made(bundle: Path, tmp_path: Path) -> None:
    """The PNG carries prompt and parameters, the seed that was drawn among them."""
    assert generate(bundle, tmp_path / "o.png", "--guidance", "3", "--negative-prompt", "a leaf") == 0
    text = read_parameters(tmp_path / "o.png")
    assert text is not None
    assert text.startswith("a red apple\nNegative prompt: a leaf\nSteps: 1, Sampler: Euler, CFG scale: 3")
    seed = text.partition("Seed: ")[2].partition(",")[0]
    assert generate(bundle, tmp_path / "p.png", "--guidance", "3", "--negative-prompt", "a leaf", "--seed", seed) == 0
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "o.png")), np.asarray(Image.open(tmp_path / "p.png"))
    )


def test_a_picture_and_a_mask(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """What is drawn into a picture is what Pipeline draws, and text and JSON say from what and how."""
    picture, mask = np.full((24, 40, 3), 180, np.uint8), np.zeros((24, 40), np.uint8)
    mask[8:16, 8:32] = 255
    files = {"image": tmp_path / "a, b.png", "mask": tmp_path / "mask.png"}
    for name, pixels in (("image", picture), ("mask", mask)):
        Image.fromarray(pixels).save(files[name])
    options: dict[str, Any] = {"strength": 0.7, "mask_blur": 1.5, "keep_outside": True, "variation_strength": 0.2}
    options |= {"steps": 3, "seed": 7, "variation_seed": 8, **files}
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    assert generate(bundle, tmp_path / "o.png", *flags, "--json") == 0
    told = json.loads(capsys.readouterr().out)["request"]
    assert told["image"] == {
        "sha256": hashlib.sha256(files["image"].read_bytes()).hexdigest(),
        "path": str(files["image"]),
    }
    assert (told["width"], told["height"], told["keep_outside"], told["resize"]) == (40, 24, True, "stretch")
    with Pipeline.load(bundle) as pipe:
        expected = pipe("a red apple", sampler="euler", **options).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), expected)
    text = read_parameters(tmp_path / "o.png")
    assert text is not None
    for entry in ("Denoising strength: 0.7", "Mask blur: 1.5", "Variation seed: 8", "Variation seed strength: 0.2"):
        assert entry in text
    assert f'Image: "{files["image"]} ' in text


def test_json(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """One JSON document with the whole request, the engine and all timings."""
    prompt = 'ein "Apfel" \N{RED APPLE}\n'
    assert generate(bundle, tmp_path / "o.png", "--json", "--seed", "7", prompt=prompt) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(tmp_path / "o.png")
    assert report["request"]["prompt"] == prompt
    assert (report["request"]["seed"], report["request"]["width"], report["truncated_tokens"]) == (7, 32, 0)
    assert (report["engine"], report["loop"]) == ("unet_step (onnxruntime)", "fused")
    assert report["engine_choice"].keys() == {"name", "reason", "passed_over"}
    stages = {"text_encoder", "prompt", "schedule", "step", "vae_decoder", "vae_encoder", "safety_checker"}
    assert report["seconds"].keys() == {*stages, "total"}
    assert len(report["seconds"]["step"]) == 1


def test_a_schedule_of_ones_own(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """Timesteps and eta are obeyed, and the file says what the web UI has no entry for."""
    flags = ("--timesteps", "900,500,100.5", "--sampler", "euler", "--guidance-end", "0.5", "--json")
    path = tmp_path / "o.png"
    assert main(["generate", str(bundle), "a cat", "--output", str(path), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["request"]["timesteps"] == [900, 500, 100.5]
    assert report["request"]["steps"] == len(report["seconds"]["step"]) == 3
    text = read_parameters(path)
    assert text is not None
    assert "Steps: 3, " in text
    assert "Guidance end: 0.5, Timesteps: 900 500 100.5, Version: " in text
    status = main(["generate", str(bundle), "a cat", "--output", str(path), "--sigmas", "1;2"])
    assert_fails(capsys, status, 2, "argument --sigmas: '1;2' is not understood; expected numbers between commas")


def test_an_empty_prompt_draws(bundle: Path, tmp_path: Path) -> None:
    """It is what the unconditional half is given anyway."""
    assert generate(bundle, tmp_path / "o.png", prompt="") == 0
    assert Image.open(tmp_path / "o.png").size == (32, 32)


def test_a_long_prompt_draws_with_a_note(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """100 kB are cut to what the text encoder takes; that is said, and the file still carries all of it."""
    prompt = "a red apple, " * 7700
    assert generate(bundle, tmp_path / "o.png", prompt=prompt) == 0
    out = capsys.readouterr().out
    assert out.startswith("note: 30725 tokens did not fit the text encoder and were cut off\n")
    text = read_parameters(tmp_path / "o.png")
    assert text is not None
    assert text.startswith(prompt.strip())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "33"], "width is 33, expected a multiple of 2; the nearest are 32 and 34"),
        (["--height", "0"], "height is 0, expected 2 to 16384"),
        (["--steps", "0"], "steps is 0, expected 1 to 10000"),
        (["--steps", "-1"], "steps is -1, expected 1 to 10000"),
        (["--guidance", "nan"], "guidance is nan, expected 0 to 1000"),
        (["--guidance", "inf"], "guidance is inf, expected 0 to 1000"),
        (["--sampler", "magic"], "unknown sampler 'magic'; known samplers: ddim, "),
        (["--sampler", "flow-euler"], "sampler 'flow-euler' cannot run from the config of 'PNDMScheduler'"),
        (["--engine", "magic"], "unknown engine 'magic'; known engines: onnxruntime, "),
        (["--seed", "-1"], "seed is -1, expected 0 to 18446744073709551615"),
        (["--seed", "9" * 30], "seed is 999999999999999999999999999999, expected 0 to"),
        (["--images", "0"], "images is 0, expected 1 to 4096"),
        (["--strength", "0.5"], "strength is given without image, the image to begin with"),
        (["--image", "missing.png"], "cannot read image from 'missing.png': No such file or directory"),
        (["--clip-skip", "2"], "clip_skip is 2, expected 0 to 1"),
        (["--threads", "-1"], "threads is -1, expected 0 (automatic) to 1024"),
        (["--width", "16384", "--height", "16384", "--images", "9"], "at most 268,435,456 fit one request"),
    ],
)
def test_a_wrong_value(bundle: Path, tmp_path: Path, capsys: Captured, options: list[str], message: str) -> None:
    """Status 2, one line, no file."""
    assert_fails(capsys, generate(bundle, tmp_path / "o.png", *options), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_no_text(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """Bytes of the command line that are no UTF-8 are refused with their place."""
    assert_fails(capsys, generate(bundle, tmp_path / "o.png", prompt="a\udcff"), 2, "lone surrogate at position 1")


def test_a_file_name_that_is_no_text(bundle: Path, tmp_path: Path) -> None:
    """A file name that is no UTF-8 is written all the same, and shown escaped."""
    output = os.fsencode(tmp_path) + b"/\xff.png"
    code = "import sys; from latentrt.runtime.cli import main; sys.exit(main())"
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", str(bundle), "a", "--output", output, "--steps", "1", *extra],
            capture_output=True,
            timeout=120,
            check=False,
            env=os.environ | {"PYTHONUTF8": "1"},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\\udcff.png" in done.stdout
    assert Image.open(output).size == (32, 32)


def test_an_engine_without_a_plan(
    bundle: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out is the command that builds one; status 1, since the command line was fine."""
    monkeypatch.setattr(engine_choice, "check_engine", lambda name, precision: None)  # as where the SDK is there
    status = generate(bundle, tmp_path / "o.png", "--engine", "tensorrt-rtx")
    assert_fails(capsys, status, 1, "build one with: latentrt build-engine SOURCE --output")


# --- output


@pytest.mark.parametrize(
    ("output", "message"),
    [("missing/o.png", "there is no directory"), (".", "it is a directory, expected the name of a file")],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, capsys: Captured, output: str, message: str
) -> None:
    """Even the bundle is not looked at, let alone a picture drawn in vain."""
    assert_fails(capsys, generate(tmp_path / "nowhere", tmp_path / output), 1, message)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """On a file system of 4 KiB the picture is not half there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "latentrt-test", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        status = generate(bundle, disk / "o.png", "--width", "96", "--height", "96")
        assert_fails(capsys, status, 1, "No space left on device; choose a place that can be written to")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- damaged bundles


def change_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        change(manifest)
        (bundle / "bundle.json").write_text(json.dumps(manifest))

    return damage


def truncate(bundle: Path) -> None:
    """Half a graph, as a copy that was cut off leaves it."""
    graph = bundle / "unet" / "step.onnx"
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])


def truncate_and_hide(bundle: Path) -> None:
    """Half a graph, and a manifest that says so."""
    truncate(bundle)
    size = (bundle / "unet" / "step.onnx").stat().st_size
    change_manifest(lambda manifest: manifest["files"]["unet/step.onnx"].update(size=size))(bundle)


def leave(manifest: dict[str, Any]) -> None:
    manifest["components"]["unet"]["graphs"].popitem()
    graph = manifest["components"]["vae_decoder"]["graphs"].popitem()[1]
    manifest["components"]["unet"]["graphs"]["x"] = graph | {"file": "../../etc/model.onnx"}


def link(bundle: Path) -> None:
    graph = bundle / "unet" / "model.onnx"
    graph.rename(bundle.parent / "elsewhere.onnx")
    graph.symlink_to(bundle.parent / "elsewhere.onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "bundle.json").unlink(), "is not a bundle: it has no bundle.json"),
        (lambda bundle: (bundle / "bundle.json").write_text("{"), "bundle.json: is not JSON"),
        (lambda bundle: (bundle / "bundle.json").write_bytes(b"\xff"), "is not UTF-8 text"),
        (change_manifest(lambda m: m.update(format_version=99)), "upgrade latentrt"),
        (change_manifest(leave), "which leaves its directory; expected a plain path inside the bundle"),
        (lambda bundle: (bundle / "unet" / "model.onnx").unlink(), "unet/model.onnx"),
        (lambda bundle: (bundle / "tokenizer" / "tokenizer.json").unlink(), "tokenizer/tokenizer.json"),
        (truncate, "but the manifest says"),
        (truncate_and_hide, "unet/step.onnx"),
        (link, "unet/model.onnx"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_damaged_bundle(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: Captured,
    command: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    """Status 1 and one line that names the damage; no file is written."""
    damage(tiny_bundle)
    if command == "generate":
        assert_fails(capsys, generate(tiny_bundle, tmp_path / "o.png"), 1, message)
        assert not (tmp_path / "o.png").exists()
    else:
        assert_fails(capsys, main(["inspect", str(tiny_bundle)]), 1, message)


def test_a_bundle_that_is_missing(tmp_path: Path, capsys: Captured) -> None:
    """The way out is the command that makes one."""
    message = "does not exist; make a bundle with latentrt build-engine"
    assert_fails(capsys, generate(tmp_path / "nowhere", tmp_path / "o.png"), 1, message)
    assert_fails(capsys, main(["inspect", str(tmp_path / "nowhere")]), 1, message)


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_changed_byte_is_found_by_its_hash(tiny_bundle: Path, tmp_path: Path, capsys: Captured, command: str) -> None:
    """With --verify-hash a file of the right size and wrong content fails; without it is not hashed."""
    file = tiny_bundle / "vae_encoder" / "model.onnx"  # drawing does not open it
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)

    def run(*options: str) -> int:
        if command == "generate":
            return generate(tiny_bundle, tmp_path / "o.png", *options)
        return main(["inspect", str(tiny_bundle), *options])

    assert_fails(capsys, run("--verify-hash"), 1, "vae_encoder/model.onnx has the SHA-256")
    assert not (tmp_path / "o.png").exists()
    assert run() == 0


def test_a_sound_bundle_passes_its_hashes(bundle: Path, tmp_path: Path) -> None:
    """--verify-hash draws the picture if nothing was changed."""
    assert generate(bundle, tmp_path / "o.png", "--verify-hash") == 0


def test_ctrl_c_while_drawing_leaves_no_file(
    bundle: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between steps ends in status 130, without a picture."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentrt.runtime.denoising.fused.FusedLoop.advance", interrupt)
    assert generate(bundle, tmp_path / "o.png") == 130
    assert capsys.readouterr() == ("", "latentrt: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_it_failed(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """The traceback comes before the usual line."""
    assert generate(bundle, tmp_path / "o.png", "--steps", "0", "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "latentrt: steps is 0, expected 1 to 10000"
