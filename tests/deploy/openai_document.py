"""OpenAI's OpenAPI document: its request fields, and validators for what it says of answers."""

from __future__ import annotations

import os
from typing import Any

import jsonschema
import yaml


def find_document() -> dict[str, Any] | None:
    """The copy that EXPERTMESH_OPENAI_SPEC names."""
    path = os.environ.get("EXPERTMESH_OPENAI_SPEC")
    if not path:
        return None
    with open(path, encoding="utf-8") as file:
        document: dict[str, Any] = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return document


def properties_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a schema, with those of the schemas that it joins."""

    def collect(schema: dict[str, Any]) -> dict[str, Any]:
        found = dict(schema.get("properties", {}))
        for part in schema.get("allOf", []):
            found |= properties_of(document, part["$ref"].rsplit("/", 1)[-1]) if "$ref" in part else collect(part)
        return found

    return collect(document["components"]["schemas"][name])


def validator_for(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    """Of one schema. The document says `nullable` where JSON Schema has a type null."""
    schemas = _with_null(document["components"]["schemas"])
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


def _with_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_null(one) for one in value]
    if not isinstance(value, dict):
        return value
    read = {key: _with_null(one) for key, one in value.items()}
    return {"anyOf": [read, {"type": "null"}]} if read.pop("nullable", False) is True else read
