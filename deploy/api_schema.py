"""Request bodies in /openapi.json: endpoints read their bodies themselves, so the framework doesn't know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema


def describe_bodies(api: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Adds the bodies of POST endpoints, by path, to the app's OpenAPI document."""
    build = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = build()
            references, definitions = models_json_schema(
                [(model, "validation") for model in bodies.values()], ref_template="#/components/schemas/{model}"
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            for path, model in bodies.items():
                content = {"application/json": {"schema": references[model, "validation"]}}
                document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        assert api.openapi_schema is not None
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
