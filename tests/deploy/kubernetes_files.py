"""What kustomize and a Kubernetes API server do to our manifests, as far as the manifests use it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


def render(directory: Path) -> list[Document]:
    """As `kubectl kustomize`: resources, namespace, and JSON 6902 patches with a target."""
    spec = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = set(spec) - {"apiVersion", "kind", "namespace", "resources", "patches"}
    assert not unknown, f"the small renderer doesn't know {unknown}"
    documents: list[Document] = []
    for name in spec["resources"]:
        path = (directory / name).resolve()
        documents += render(path) if path.is_dir() else [d for d in yaml.safe_load_all(path.read_text()) if d]
    documents = copy.deepcopy(documents)  # YAML anchors make shared parts
    for document in documents:
        if "namespace" in spec:
            document["metadata"]["namespace"] = spec["namespace"]
    for patch in spec.get("patches", ()):
        target = patch["target"]
        hit = [d for d in documents if d["kind"] == target["kind"] and d["metadata"]["name"] == target["name"]]
        assert len(hit) == 1, target
        for operation in yaml.safe_load(patch["patch"]):
            _apply(hit[0], operation)
    return [yaml.safe_load(yaml.dump(d, Dumper=_NoAliases)) for d in documents]


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _apply(document: Document, operation: dict[str, Any]) -> None:
    *path, last = operation["path"].lstrip("/").split("/")
    at: Any = document
    for part in path:
        at = at[int(part)] if isinstance(at, list) else at[part]
    value = copy.deepcopy(operation["value"])
    if isinstance(at, list):
        assert operation["op"] == "add" and last == "-"
        at.append(value)
        return
    assert operation["op"] == "add" or last in at, f"nothing to replace at {operation['path']}"
    at[last] = value


def problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Where a value differs from an OpenAPI v3 structural schema. Unknown fields are refused."""
    found: list[str] = []
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, (int, str)):
            return [f"{path}: {value!r} is no number and no string"]
        if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
            return [f"{path}: {value!r} is no quantity"]
        return []
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return [f"{path}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{path}: {value!r} does not match {schema['pattern']}")
    for bound, wrong in (("minimum", lambda a, b: a < b), ("maximum", lambda a, b: a > b)):
        if bound in schema and wrong(value, schema[bound]):
            found.append(f"{path}: {value} is beyond the {bound} {schema[bound]}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{path}[{i}]")
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{path}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            if name in properties:
                found += problems(item, properties[name], f"{path}.{name}")
            elif isinstance(more, dict):
                found += problems(item, more, f"{path}.{name}")
            elif not more and not schema.get("x-kubernetes-preserve-unknown-fields") and properties:
                found.append(f"{path}.{name}: unknown field")
    return found


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """As the API server stores it."""
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        filled = {
            n: with_defaults(v, properties.get(n, schema.get("additionalProperties") or {})) for n, v in value.items()
        }
        return {
            n: copy.deepcopy(p["default"]) for n, p in properties.items() if "default" in p and n not in value
        } | filled
    return value
