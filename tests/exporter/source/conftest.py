"""What tests of sources share: refusals as messages, checkpoints in a single file, and a pickle that betrays itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import SourceError
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.exporter.source.source import Source


def load_all(source: Source) -> None:
    for part in source.family.parts:
        source.load(part)
    source.load_tokenizer()


def message_of(act: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    return message


@pytest.fixture
def refusal() -> Callable[..., str]:
    """A function that gives the message with which a source is refused, at opening or, with ``load``, at loading."""

    def refuse(path: Path, *, load: bool = False) -> str:
        if not load:
            return message_of(lambda: open_source(path))
        source = open_source(path)
        return message_of(lambda: load_all(source))

    return refuse


@pytest.fixture
def file_refusal() -> Callable[..., str]:
    """A function that gives the message with which a single file is refused, at opening or else at loading."""

    def refuse(file: Path, config: Path | None, **reading: Any) -> str:
        return message_of(lambda: load_all(open_source(file, Reading(config=config, **reading))))

    return refuse


class Witness:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def write_pickle(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that writes a pickle, and gives the path of the file that appears if anybody unpickles it."""

    def write(file: Path) -> Path:
        file.write_bytes(pickle.dumps(Witness(tmp_path / "ran")))
        return tmp_path / "ran"

    return write


class Checkpoints:
    """Checkpoints of the tiny sources, each written when it is first asked for; not to be changed."""

    def __init__(self, layout: Any, tiny: Any, directory: Path) -> None:
        self._layout, self._tiny, self._directory = layout, tiny, directory

    def __call__(self, kind: str) -> Path:
        file = self._directory / f"{kind}.safetensors"
        return file if file.exists() else Path(self._layout.write(file, self._tiny.source(kind), kind))


@pytest.fixture(scope="session")
def checkpoints(original_layout: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints by kind."""
    return Checkpoints(original_layout, tiny, tmp_path_factory.mktemp("checkpoints"))
