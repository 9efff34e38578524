"""The command line as a whole: what it lists, loads and returns, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from latentrt import runtime
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError, OutputError
from latentrt.runtime import cli
from latentrt.runtime.cli import COMMANDS, main

HEAVY = ("numpy", "onnxruntime", "PIL", "tokenizers", "tqdm", "torch", "diffusers", "transformers", "onnx")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    code = "import sys; from latentrt.runtime.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names each command with its line, and succeeds."""
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.help}" in out


def test_the_package_runs_as_a_module() -> None:
    """``python -m latentrt.runtime`` is the same command, under its own name."""
    code = [sys.executable, "-m", "latentrt.runtime"]
    helped = subprocess.run([*code, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout == run("--help").stdout
    failed = subprocess.run([*code, "nonsense"], capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 2


def test_help_loads_nothing_heavy() -> None:
    """Neither an SDK nor even numpy is imported for --help."""
    assert loaded_after("from latentrt.runtime.cli import main; main(['--help'])").isdisjoint(HEAVY)


def test_importing_the_runtime_opens_nothing() -> None:
    """The package itself loads no numpy; with Pipeline come neither an SDK nor a training framework."""
    assert loaded_after("import latentrt.runtime").isdisjoint(HEAVY)
    loaded = loaded_after("from latentrt.runtime import Pipeline")
    assert loaded >= {"numpy", "tokenizers"}
    assert loaded.isdisjoint({"onnxruntime", "tqdm", "tensorrt", "torch", "diffusers", "transformers", "onnx"})


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.extra is None])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A command's --help shows its arguments and the common --debug."""
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: latentrt {name}" in out
    assert "--debug" in out
    assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version is the installed version, which the package has as well."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentrt {version('latentrt')}\n"
    assert runtime.__version__ == version("latentrt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see: latentrt --help"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "the following arguments are required: BUNDLE, --output; see: latentrt generate --help"),
        (["inspect", "b", "--jason"], "unrecognized arguments: --jason"),
        (["generate", "b", "p", "--output", "o.png", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["generate", "b", "p", "--out", "o.png"], "arguments are required: --output"),
        (["generate", "b", "p", "--output", "o.png", "--precision", "fp64"], "argument --precision: invalid choice"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """One line on stderr, nothing on stdout, status 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("latentrt: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("too many\nsteps"), 2),
        (BundleError("too many\nsteps"), 1),
        (EngineError("too many\nsteps"), 1),
        (OutputError("too many\nsteps"), 1),
        (OSError("too many\nsteps"), 1),
        (MemoryError("too many\nsteps"), 1),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """The message fits one line without a traceback; --debug shows where it came from, before that line."""

    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("latentrt.runtime.cli.inspect.run", fail)
    assert main(["inspect", "b"]) == status
    assert capsys.readouterr() == ("", "latentrt: too many steps\n")
    assert main(["inspect", "b", "--debug"]) == status
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in fail" in err
    assert err.endswith("latentrt: too many steps\n")


def test_an_error_without_a_message_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty line would tell nothing."""

    def fail(arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr("latentrt.runtime.cli.inspect.run", fail)
    assert main(["inspect", "b"]) == 1
    assert capsys.readouterr().err == "latentrt: MemoryError\n"


def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption is one line and the shell's status for it."""

    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentrt.runtime.cli.inspect.run", interrupt)
    assert main(["inspect", "b"]) == 130
    assert capsys.readouterr().err == "latentrt: interrupted\n"


def test_a_command_whose_packages_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the package and the extra that brings it."""
    for name in [name for name in sys.modules if name.startswith("latentrt.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["build-engine", "--help"]) == 1
    err = capsys.readouterr().err
    assert 'torch is not installed, which this command needs; install it with: pip install "latentrt[export]"' in err
    assert err.count("\n") == 1


def test_a_reader_that_goes_away(tiny_bundles: dict[str, Path]) -> None:
    """`latentrt inspect | head -0` ends without a word on stderr."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from latentrt.runtime.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tiny_bundles["sd1"]), "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk(tiny_bundles: dict[str, Path]) -> None:
    """`latentrt inspect > file` on a full disk says so once and fails."""
    code = "import sys; from latentrt.runtime.cli import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(tiny_bundles["sd1"])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "latentrt: [Errno 28] No space left on device\n"


def test_the_process_returns_the_status(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """0 with JSON on stdout, 1 for a bundle that is none, 2 for a wrong command line."""
    done = run("inspect", str(tiny_bundles["sd1"]), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["manifest"]["format_version"] == 2
    failed = run("inspect", str(tmp_path))
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
    assert run("inspect").returncode == 2


def test_only_the_chosen_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is spelt like a command is a prompt."""
    loaded = []
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda entry: loaded.append(entry.module) or load(entry))
    assert main(["generate", "nowhere", "inspect", "--output", "o.png"]) == 1
    assert loaded == ["latentrt.runtime.cli.generate"]
