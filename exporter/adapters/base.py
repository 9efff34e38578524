"""Files of an adapter as a caller gives them: the base of all kinds, command-line options, and shared checks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from latentrt.engines.errors import InvalidRequestError, SourceError

from ..components import Adapter
from ..source.optimum import GraphFolders
from ..source.source import Source


@dataclass(frozen=True)
class Option:
    """A command-line option that names files of an adapter.

    Attributes:
        flag: The option with its dashes, such as ``"--tiny-vae"``.
        metavar: How the help text writes its value.
        help: One line that reads well both for building a bundle and for comparing one with its source.
        repeated: Whether it may be given more than once.
    """

    flag: str
    metavar: str
    help: str
    repeated: bool = False

    @property
    def name(self) -> str:
        """Key of its values, such as ``"tiny_vae"``."""
        return self.flag.removeprefix("--").replace("-", "_")


class AdapterFiles(ABC):
    """Files of one kind of adapter, not yet read; :meth:`open` checks them against a source."""

    title: ClassVar[str]
    """One of the kind with its article, as messages begin with it."""
    options: ClassVar[tuple[Option, ...]]
    """Command-line options that name the files."""
    controls: ClassVar[bool] = False
    """Whether it goes only with families that are :attr:`~latentrt.exporter.families.base.Family.controllable`."""

    @classmethod
    @abstractmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """The files that a command line names.

        Args:
            values: Values of each of :attr:`options`, by :attr:`Option.name`; one that is not given has none.

        Returns:
            ``None`` if no option of the kind is given.

        Raises:
            InvalidRequestError: if a value cannot be understood, or one option needs another.
        """

    def check(self, source: Source) -> None:
        """Refuse a source that no adapter of the kind goes with, before a file is read.

        Raises:
            InvalidRequestError: saying why.
        """
        if isinstance(source.weights, GraphFolders):
            raise InvalidRequestError(
                f"{source.name} holds graphs that are run as they are; {self.title} goes with weights"
            )
        if self.controls and not source.family.controllable:
            raise InvalidRequestError(f"{self.title} for models of the family {source.family.name} is not supported")

    @abstractmethod
    def open(self, source: Source) -> Adapter:
        """Check the files against a source that :meth:`check` let pass.

        Raises:
            SourceError: if a file is missing, damaged, of a kind that is not supported, or for another model.
            InvalidRequestError: if files exclude each other.
        """


def require_directory(path: Path, title: str) -> None:
    """Refuse a path that is no directory.

    Args:
        path: The path.
        title: A word for it, for the message.

    Raises:
        SourceError: saying whether there is nothing or something else.
    """
    if not path.is_dir():
        raise SourceError(f"the {title} {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")


def content_digest(files: Iterable[Path], name: str = "") -> str:
    """SHA-256 over a name and the contents of files, in their order."""
    digest = hashlib.sha256(name.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
