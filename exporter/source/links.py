"""Symbolic links in a source: none may lead out of it, or what is exported would be somebody else's file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from latentrt.engines.errors import SourceError


def check_links(root: Path, folders: Iterable[str]) -> None:
    """Refuse links that lead out of a directory.

    The cache of a model hub is made of links, from ``snapshots/<commit>`` to ``blobs`` beside it; those are followed.

    Args:
        root: The directory; links in its own path are the caller's business.
        folders: Those below it that are read, besides the files in the directory itself.

    Raises:
        SourceError: naming the first link.
    """
    inside = root.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    present = [root / name for name in folders if (root / name).exists()]
    files = [file for folder in (root, *present) if folder.is_dir() for file in folder.iterdir() if not file.is_dir()]
    for path in (*present, *files):
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            continue  # leads nowhere: whoever needs it will miss it
        if not any(target.is_relative_to(place) for place in allowed):
            raise SourceError(
                f"{path.relative_to(root).as_posix()} is a link out of {root.name}; put the file itself in its place"
            )
