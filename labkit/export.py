"""The command lines of other engines: `python -m labkit.export` (see `labkit.serving.export`)."""

import sys

from labkit.serving.export import main

if __name__ == "__main__":
    sys.exit(main())
