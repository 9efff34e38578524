"""Virtual environments of the peers: one for each pinned list in ``requirements/``, made at its first use and kept.

A list names every package of a working environment (``pip freeze``), so pip ignores the packages' own requirements:
some peers refuse versions that they work with. PyTorch is the exception: its wheel for CUDA needs libraries that its
wheel for the CPU does not, and no list can be right for both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

from latentrt.engines.errors import LatentRTError, OutputError

from .keeping import keep

REQUIREMENTS = Path(__file__).with_name("requirements")
"""The folder of the pinned lists."""


class PeerUnavailableError(LatentRTError, RuntimeError):
    """A peer's environment cannot be made here."""


def default_root() -> Path:
    """The default folder for environments: ``latentrt/peers`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt" / "peers"


def environment(name: str, root: Path | None = None) -> Path:
    """Find the environment of a list, or make it, which can take minutes.

    Args:
        name: Name of the list, ``requirements/<name>.txt``.
        root: The folder for environments; :func:`default_root` if ``None``. An environment cannot be moved.

    Returns:
        The path of its Python.

    Raises:
        OutputError: if the environment cannot be written.
        PeerUnavailableError: if there is no such list, or one of its packages cannot be installed.
    """
    path = REQUIREMENTS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in REQUIREMENTS.glob("*.txt")))
        raise PeerUnavailableError(f"there is no list of packages for {name!r}, expected one of {known}")
    folder = (root or default_root()) / f"{name}-{_key(path)}"
    try:
        keep(folder, functools.partial(_make, requirements=path), _is_sound)
    except OSError as error:
        raise OutputError(f"the environment of {name!r} could not be written: {error}") from error
    return _python(folder)


def _make(folder: Path, requirements: Path) -> None:
    venv.EnvBuilder(symlinks=True).create(folder)
    _install(folder, "--no-deps", "--requirement", str(requirements))
    if torch := [each for each in _lines(requirements) if each.startswith("torch==")]:
        _install(folder, *torch)


def _install(folder: Path, *arguments: str) -> None:
    """Install with the pip of this Python, so that an environment holds its list and nothing else."""
    if importlib.util.find_spec("pip") is None:
        raise PeerUnavailableError(f"pip is missing: install it with `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "--python", str(_python(folder)), "install", "--quiet", "--no-input"]
    options = ["--disable-pip-version-check", "--no-warn-script-location"]
    done = subprocess.run([*command, *options, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerUnavailableError(f"pip cannot install the packages of {folder.name}: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of pip's output that states an error."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def _is_sound(folder: Path) -> bool:
    """Whether the Python that the environment was made with is still installed."""
    return _python(folder).exists()


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _key(requirements: Path) -> str:
    decides = [platform.python_implementation(), platform.python_version(), platform.machine()]
    return hashlib.sha256("\n".join([*decides, *_lines(requirements)]).encode()).hexdigest()[:12]


def _lines(requirements: Path) -> list[str]:
    """The lines of a list without comments, so that a changed comment does not change the environment's key."""
    lines = [line.strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
