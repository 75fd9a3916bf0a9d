"""Command lines of other engines, or a run as a page: `python -m labkit.export` (`labkit.serving.export`)."""

import sys

from labkit.serving.export import main

if __name__ == "__main__":
    sys.exit(main())
