"""Prefill apart from decode: prompts are computed in a process of their own, and answers grow in this one.

Where both share an engine, each chunk of a long prompt makes the steps longer that it is in, and everybody's
answer waits for it. Apart, no answer waits for a prompt; but keys and values must travel, and neither process
can help the other out (DistServe, Zhong et al. 2024; Splitwise, Patel et al. 2024).
"""

from labkit.disaggregated.engine import DisaggregatedEngine

__all__ = ["DisaggregatedEngine"]
