"""The OpenAPI 3.1 document of the API: kinds from the registry, other routes from what stands at their handlers.

In: the routes that are served, each with its ``@described`` (``describe.py``) and its action (``access.py``). Out: a
plain document. What is served and not described is not in it; a test says that there is no such route.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from starlette.routing import Route

from edgeward.core.access import action_of
from edgeward.core.describe import JSON, About, about_of
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


def _described(routes: Iterable[Route]) -> Iterator[tuple[str, str, Route, About]]:
    """Path as the document has it, method, route and description."""
    for route in routes:
        about = about_of(route.endpoint)
        if about is not None:
            for method in sorted(set(route.methods or ()) - {"HEAD"}):
                yield route.path.replace("{ns}", "{namespace}"), method.lower(), route, about


def _operation_id(path: str, method: str) -> str:
    """``appsLogs``, ``postCaRotate``, ``streamsName``: of the path, without what all have in common."""
    words = re.findall(r"[a-z]+", path.removeprefix("/api/v1").replace("/namespaces/{namespace}", ""), re.I)
    words = words if path.endswith("}") else [w for w in words if f"{{{w}}}" not in path]
    first, *rest = ([method] if method != "get" else []) + words
    return str(first) + "".join(w.capitalize() for w in rest)


def _operation(path: str, method: str, route: Route, about: About) -> dict[str, Any]:
    def schema(form: Any) -> dict[str, Any]:
        return {"$ref": _REF.format(name=form.__name__)} if form is not None else {"type": "object"}

    answer = schema(about.answer) if "json" in about.media and "nd" not in about.media else {"type": "string"}
    action = action_of(route)
    operation: dict[str, Any] = {
        "tags": ["System"],
        "summary": about.summary,
        "operationId": _operation_id(path, method),
        "parameters": [
            *(_parameter(n, "path", f"The {n}" if n == "namespace" else "The name") for n in _names(path)),
            *(_parameter(n, "query", text, {"type": form}) for n, (form, text) in about.query.items()),
        ],
        "responses": {
            str(about.code): {"description": "Done", "content": {about.media: {"schema": answer}}},
            **{code: {"description": text} for code, text in about.more.items()},
            "default": _answers(_REF.format(name="Problem"))["default"],
        },
    }
    if about.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema(about.body)}}}
    if action is not None and action.how == "open":
        operation["security"] = []
    elif action is not None and action.verbs:
        operation["description"] = f"Needs {', '.join(action.verbs)}" + (f" of {action.kind}" if action.kind else "")
    return operation


def _names(path: str) -> list[str]:
    return re.findall(r"{(\w+)}", path)


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


def document(version: str, routes: Iterable[Route] = ()) -> dict[str, Any]:
    """OpenAPI 3.1 as a plain document."""
    more = list(_described(routes))
    said = dict.fromkeys(form for *_, about in more for form in (about.body, about.answer) if form is not None)
    types = [Metadata, *(k.spec for k in kinds), *said]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    schemas: dict[str, Any] = {**components, "Problem": _PROBLEM}
    paths: dict[str, Any] = {}
    for path, method, route, about in more:
        paths.setdefault(path, {})[method] = _operation(path, method, route, about)
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
