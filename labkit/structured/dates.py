"""Dates and times in a schema as calendars have them: the library's own are the shape of RFC 3339 alone.

It takes 29 February in any year, the year 0, and a 60th second at any time. Other readers refuse these.
"""

from __future__ import annotations

from typing import Any

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # not 1900
_DATE = f"(?:{_YEAR}-(?:(?:0[13-9]|1[0-2])-[0-9]{{2}}|02-[01][0-9]|02-2[0-8])|{_LEAP_YEAR}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}", "date-time": f"^{_DATE}[Tt]{_TIME}"}

# Keywords whose values are schemas, lists of schemas, or schemas by name. The rest is data, or is negated.
_ONE = ("additionalProperties", "items", "then", "else", "contains", "propertyNames")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def with_real_dates(schema: Any) -> Any:
    """Return a schema in which dates and times exist; what has none is the same."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key, value in schema.items():
        if key in _ONE:
            found[key] = with_real_dates(value)
        elif key in _MANY and isinstance(value, list):
            found[key] = [with_real_dates(each) for each in value]
        elif key in _NAMED and isinstance(value, dict):
            found[key] = {name: with_real_dates(each) for name, each in value.items()}
    pattern = _PATTERNS.get(str(schema.get("format")))
    if pattern:
        found["allOf"] = [*found.get("allOf", ()), {"pattern": pattern}]
    return found
