#!/usr/bin/env bash
# llguidance 1.9.1 and jsonschema 4.26.0: a JSON schema with `"format": "date"` lets answers through that are no
# dates. 29 February 2023 is accepted and complete, and jsonschema refuses it; so is "time" with a 60th second at
# half past twelve, which RFC 3339 (section 5.7) has at leap seconds alone. The formats are the shape of digits.
# Seen: date 2023-02-29 accepted, jsonschema says False; date 2023-02-31 refused by both; time 12:30:60Z accepted.
# Whoever promises "valid by the schema" and checks formats finds answers that break the promise.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "llguidance==1.9.1" "jsonschema[format]==4.26.0" "numpy<3"
"$folder/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    tokens = [bytes([number]) for number in range(256)] + [b""]
    special_token_ids, eos_token_id, bos_token_id = [256], 256, None

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))


def both(kind, text):
    schema = {"type": "string", "format": kind}
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    written = list(json.dumps(text).encode())
    allowed = matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting()
    valid = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(text)
    print(f"{kind} {text}: allowed {allowed}, valid {valid}")
    return allowed, valid


print("llguidance", version("llguidance"), "jsonschema", version("jsonschema"))
found = [both("date", "2023-02-29"), both("date", "2024-02-29"), both("date", "2023-02-31"), both("time", "12:30:60Z")]
if found[:3] != [(True, False), (True, True), (False, False)] or not found[3][0]:
    raise SystemExit("this has changed")
PY
