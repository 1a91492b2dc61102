"""The OpenAPI 3.1 document of the API, made from the registry and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec

from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import API_VERSION, Metadata

_PROBLEM = {
    "type": "object",
    "description": "RFC 9457 problem document",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string", "description": "The reason, for machines"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "resource": {"type": "string"},
        "field": {"type": "string", "description": "Path of the field, e.g. $.spec.replicas"},
        "remedy": {"type": "string"},
        "file": {"type": "string"},
        "line": {"type": "integer"},
    },
}
_REF = "#/components/schemas/{name}"


def _schema_name(kind: Kind) -> str:
    return kind.spec.__name__


def _parameter(name: str, where: str, text: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "description": text,
        "required": where == "path",
        "schema": schema or {"type": "string"},
    }


_LIST = [
    _parameter("labelSelector", "query", "key=value, key!=value, key in (a,b), key, !key"),
    _parameter("fieldSelector", "query", "path=value, e.g. status.phase=Running"),
    _parameter("limit", "query", "Items a page", {"type": "integer", "minimum": 1, "maximum": 1000}),
    _parameter("continue", "query", "The token of the page before"),
    _parameter("watch", "query", "Server-sent events instead of a list", {"type": "boolean"}),
    _parameter("resourceVersion", "query", "Watch: what changed after this revision"),
]
_WRITE = [
    _parameter("dryRun", "query", "Check only", {"type": "boolean"}),
    _parameter("If-Match", "header", "The revision it must have; another gives 409"),
]
_STATUS = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
_RECORDS = [
    _parameter("since", "query", "Only records behind this number", {"type": "integer", "minimum": 0}),
    _parameter("limit", "query", "At most the last so many", {"type": "integer", "minimum": 1, "maximum": 10_000}),
]
_FOLLOW = _parameter("follow", "query", "Go on with what comes, by server-sent events", {"type": "boolean"})


def _fixed() -> dict[str, Any]:
    """What hub and agent have beside the kinds."""

    def get(summary: str, name: str, parameters: list[dict[str, Any]], media: str = "application/json") -> Any:
        done = {
            "description": "Done",
            "content": {media: {"schema": {"type": "string" if "text" in media else "object"}}},
        }
        answers = {"200": done, "default": _answers(_REF.format(name="Problem"))["default"]}
        return {"get": {"tags": ["System"], "summary": summary, "operationId": name, "parameters": parameters,
                        "responses": answers}}  # fmt: skip

    health = {"503": {"description": "Not ready"}}
    paths = {
        "/healthz": get("Whether the process lives", "healthz", []),
        "/readyz": get("Whether it does its work", "readyz", []),
        "/metrics": get("Prometheus metrics; open on loopback", "metrics", [], "text/plain"),
        "/openapi.json": get("This document", "openapi", []),
        "/api/v1/version": get("Role and version", "version", []),
        "/api/v1/audit": get("Who wrote what, refused writes too", "audit", _RECORDS),
        "/api/v1/events": get("What happened", "events", [*_RECORDS, _FOLLOW]),
        "/api/v1/journal": get("How changes of both sides were decided", "journal", [*_RECORDS, _FOLLOW]),
    }
    for path in ("/healthz", "/readyz"):
        paths[path]["get"]["security"] = []
    paths["/readyz"]["get"]["responses"] |= health
    return paths


def _body(ref: str) -> dict[str, Any]:
    content = {"schema": {"$ref": ref}}
    return {"required": True, "content": {"application/json": content, "application/yaml": content}}


def _answers(ref: str, code: str = "200") -> dict[str, Any]:
    problem = {
        "description": "A problem",
        "content": {"application/problem+json": {"schema": {"$ref": _REF.format(name="Problem")}}},
    }
    return {
        code: {"description": "Done", "content": {"application/json": {"schema": {"$ref": ref}}}},
        "default": problem,
    }


def _paths(kind: Kind) -> dict[str, Any]:
    one, many = _REF.format(name=kind.name), _REF.format(name=f"{kind.name}List")
    prefix = f"/api/v1/namespaces/{{namespace}}/{kind.plural}" if kind.namespaced else f"/api/v1/{kind.plural}"
    home = [_parameter("namespace", "path", "The namespace")] if kind.namespaced else []
    named = [*home, _parameter("name", "path", f"The {kind.name}'s name")]
    tag = {"tags": [kind.name]}
    patch_body = {"required": True, "content": {"application/merge-patch+json": {"schema": {"type": "object"}}}}
    paths: dict[str, Any] = {
        prefix: {
            "parameters": home,
            "get": {**tag, "summary": f"List or watch {kind.plural}", "operationId": f"list{kind.name}",
                    "parameters": _LIST, "responses": _answers(many)},
            "post": {**tag, "summary": f"Create a {kind.name}", "operationId": f"create{kind.name}",
                     "parameters": _WRITE[:1], "requestBody": _body(one), "responses": _answers(one, "201")},
        },
        f"{prefix}/{{name}}": {
            "parameters": named,
            "get": {**tag, "summary": f"Get a {kind.name}", "operationId": f"get{kind.name}",
                    "responses": _answers(one)},
            "put": {**tag, "summary": f"Replace a {kind.name}", "operationId": f"replace{kind.name}",
                    "parameters": _WRITE, "requestBody": _body(one), "responses": _answers(one)},
            "patch": {**tag, "summary": f"Merge-patch a {kind.name}", "operationId": f"patch{kind.name}",
                      "parameters": _WRITE, "requestBody": patch_body, "responses": _answers(one)},
            "delete": {**tag, "summary": f"Delete a {kind.name}", "operationId": f"delete{kind.name}",
                       "parameters": _WRITE, "responses": _answers(one)},
        },
    }  # fmt: skip
    paths[f"{prefix}/{{name}}/status"] = {
        "parameters": named,
        "get": {**tag, "summary": f"Get a {kind.name} with its status", "operationId": f"get{kind.name}Status",
                "responses": _answers(one)},
        "put": {**tag, "summary": f"Replace the status of a {kind.name}: for controllers",
                "operationId": f"replace{kind.name}Status", "parameters": _WRITE[:1],
                "requestBody": _STATUS, "responses": _answers(one)},
        "patch": {**tag, "summary": f"Merge-patch the status of a {kind.name}: for controllers",
                  "operationId": f"patch{kind.name}Status", "parameters": _WRITE[:1],
                  "requestBody": _STATUS, "responses": _answers(one)},
    }  # fmt: skip
    if kind.namespaced:
        paths[f"/api/v1/{kind.plural}"] = {
            "get": {**tag, "summary": f"List {kind.plural} of all namespaces", "operationId": f"listAll{kind.name}",
                    "parameters": _LIST, "responses": _answers(many)}
        }  # fmt: skip
    return paths


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 as a plain document."""
    types = [Metadata, *(k.spec for k in kinds)]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    schemas: dict[str, Any] = {**components, "Problem": _PROBLEM}
    paths: dict[str, Any] = _fixed()
    for kind in kinds:
        schemas[kind.name] = {
            "type": "object",
            "description": kind.doc,
            "required": ["apiVersion", "kind", "metadata"],
            "properties": {
                "apiVersion": {"const": API_VERSION},
                "kind": {"const": kind.name},
                "metadata": {"$ref": _REF.format(name="Metadata")},
                "spec": {"$ref": _REF.format(name=_schema_name(kind))},
                "status": {"type": "object", "readOnly": True},
            },
        }
        schemas[f"{kind.name}List"] = {
            "type": "object",
            "required": ["items"],
            "properties": {
                "metadata": {"type": "object"},
                "items": {"type": "array", "items": {"$ref": _REF.format(name=kind.name)}},
            },
        }
        paths |= _paths(kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Edgeward", "version": version, "summary": "The API of hub and agent"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }
