"""Virtual environments of the peers, and the lists that they are made from."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from latentrt.benchmarks.peers import environments
from latentrt.engines.errors import LatentRTError, OutputError


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
