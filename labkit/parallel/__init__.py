"""One model over several processes, as tensor parallelism: each holds a part of every layer.

The scheduler, the block tables and sampling stay in the first process. Before each forward pass it tells the
others which tokens to compute and where their keys and values go; then all of them run the same layers, each
on its own heads and columns, and add up what they have twice a layer.
"""

from labkit.parallel.group import ParallelError
from labkit.parallel.load import load_parallel

__all__ = ["ParallelError", "load_parallel"]
