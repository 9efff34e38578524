"""``python -m latentrt.runtime``: the same as the ``latentrt`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
