"""`python -m tests.transfer.sender PORT TOKEN,TOKEN,...` computes a prompt and sends its pages."""

from __future__ import annotations

import sys

from labkit import SamplingParams
from labkit.transfer import export_kv, send_kv
from tests.engines import drain, engine_of


def main() -> None:
    port, prompt = int(sys.argv[1]), [int(token) for token in sys.argv[2].split(",")]
    engine = engine_of()
    engine.add_request(prompt, SamplingParams(max_tokens=1))
    drain(engine)
    send_kv(("127.0.0.1", port), export_kv(engine, prompt))


if __name__ == "__main__":
    main()
