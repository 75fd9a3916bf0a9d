#!/usr/bin/env bash
# jsonschema 4.26.0: `FormatChecker()`, the one that examples pass to a validator of any draft, checks "time" by
# draft 3 (hours, minutes, seconds and nothing else), whatever the schema's draft is. So under draft 2020-12 it
# refuses "12:30:59Z", which that draft (RFC 3339) asks for, and accepts "12:30:59", which that draft refuses.
# The checker of the draft, `Draft202012Validator.FORMAT_CHECKER`, does the opposite of both.
# Seen: FormatChecker() False, True; Draft202012Validator.FORMAT_CHECKER True, False.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jsonschema[format]==4.26.0"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from jsonschema import Draft202012Validator, FormatChecker

schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "string", "format": "time"}
found = {}
for name, checker in (("FormatChecker()", FormatChecker()), ("of the draft", Draft202012Validator.FORMAT_CHECKER)):
    validator = Draft202012Validator(schema, format_checker=checker)
    found[name] = [validator.is_valid(text) for text in ("12:30:59Z", "12:30:59")]
print("jsonschema", version("jsonschema"), found)
if found != {"FormatChecker()": [False, True], "of the draft": [True, False]}:
    raise SystemExit("this has changed")
PY
