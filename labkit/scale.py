"""Several engines behind one address: `python -m labkit.scale` (see `labkit.serving.scale`)."""

import sys

from labkit.serving.scale import main

if __name__ == "__main__":
    sys.exit(main())
