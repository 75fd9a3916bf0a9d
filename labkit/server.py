"""OpenAI's API on an engine of our own: `python -m labkit.server` (see `labkit.serving.server`)."""

import sys

from labkit.serving.server import main

if __name__ == "__main__":
    sys.exit(main())
