"""Start the program of a peer: ``<its environment>/bin/python .../peers/launch.py NAME``.

With ``SOURCE TARGET`` after the name it converts a checkpoint and ends, see
:mod:`latentrt.benchmarks.peers.conversion`.

The folder is loaded from its path, as a package under a name of its own. So the programs can share its modules, and
no module here hides a library of the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = "latentrt_peers"
"""Name of the package that the folder is loaded as."""


def main(name: str, *paths: str) -> int:
    """Serve the contender of a peer's module, or convert a checkpoint with it; returns the exit status.

    Args:
        name: Name of the module.
        paths: Source and target of a conversion; none to serve.
    """
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, "the path of a Python file makes a spec"
    assert spec.loader is not None, "and that spec has a loader"
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    peer = importlib.import_module(f"{PACKAGE}.{name}")
    status: int
    if paths:
        conversion = importlib.import_module(f"{PACKAGE}.conversion")
        status = conversion.main(peer.convert, *paths)
    else:
        wire = importlib.import_module(f"{PACKAGE}.wire")
        status = wire.serve(peer.Contender)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
