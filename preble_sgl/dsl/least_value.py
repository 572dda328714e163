"""A small value that fits a JSON schema, for when a program runs and no model is there to write one."""

from collections.abc import Mapping
from typing import Any


def least_value(schema: Mapping[str, Any]) -> Any:
    """Return a small value that fits a JSON schema, as far as pydantic types make them."""
    return _least(schema, schema)


def _least(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return _least(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for chosen in ("anyOf", "oneOf", "allOf"):
        if chosen in schema:
            options = schema[chosen]
            return None if {"type": "null"} in options else _least(options[0], root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    return _of_type(schema, root)


def _of_type(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return {name: _least(fields[name], root) for name in schema.get("required", ())}
        case "array":
            first = [_least(item, root) for item in schema.get("prefixItems", ())]
            missing = range(len(first), schema.get("minItems", 0))
            return first + [_least(schema.get("items", {}), root) for _ in missing]
        case "integer" | "number":
            return _least_number(schema)
        case "boolean":
            return False
        case "null":
            return None
        case _:
            return "x" * schema.get("minLength", 1)


def _least_number(schema: Mapping[str, Any]) -> Any:
    """Return the least number, or the one nearest to 0 if there is no least."""
    if "minimum" in schema:
        return schema["minimum"]
    below = schema.get("exclusiveMaximum")
    if "exclusiveMinimum" in schema:
        above = schema["exclusiveMinimum"]
        return above + 1 if below is None or above + 1 < below else (above + below) / 2
    return min(0, schema.get("maximum", 0), 0 if below is None else below - 1)
