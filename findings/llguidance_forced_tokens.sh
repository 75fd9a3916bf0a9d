#!/usr/bin/env bash
# llguidance 1.9.1: with the option `no_forcing` in a grammar, LLMatcher.compute_ff_tokens()
# says that nothing is forced, although `compute_ff_bytes()` names the forced bytes. After somebody has called
# `compute_ff_bytes()`, the same call on the same state returns the forced tokens: a question changes the answer
# to another question. Without the option both agree from the start.
# Seen: before [], bytes b'{"', after [123, 34]; without the option [123, 34] at once (a vocabulary of bytes).
# Whoever jumps ahead by forced tokens alone never does, without an error. Asking for the bytes first helps.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "llguidance==1.9.1" "numpy<3"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    tokens = [bytes([number]) for number in range(256)] + [b""]
    special_token_ids, eos_token_id, bos_token_id = [256], 256, None

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
grammar = 'start: "{" /"[ab]/'
option = '%llguidance {"no_forcing": true}\n'
matcher = LLMatcher(tokenizer, option + grammar)
before, forced, after = matcher.compute_ff_tokens(), matcher.compute_ff_bytes(), matcher.compute_ff_tokens()
plain = LLMatcher(tokenizer, grammar).compute_ff_tokens()
print(f"llguidance {version('llguidance')}: before {before}, bytes {forced}, after {after}; without the option {plain}")
if (before, forced[:1], after[:1], plain[:1]) != ([], b"{", [123], [123]):
    raise SystemExit("this has changed")
PY
