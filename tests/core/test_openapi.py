"""The API's description of itself."""

from __future__ import annotations

import json
import re

from edgeward.core.openapi import document
from edgeward.core.registry import kinds
from edgeward.hub.kinds import load

load()


def test_the_openapi_document_is_whole() -> None:
    """Every reference resolves, every path parameter is declared, every operation has one name, every kind is there."""
    doc = document("1.2.3")
    assert json.loads(json.dumps(doc)) == doc
    assert (doc["openapi"], doc["info"]["version"]) == ("3.1.0", "1.2.3")
    schemas = doc["components"]["schemas"]
    for ref in re.findall(r'"\$ref": "([^"]+)"', json.dumps(doc)):
        assert ref.startswith("#/components/schemas/")
        assert ref.rpartition("/")[2] in schemas, ref
    ids: list[str] = []
    for path, item in doc["paths"].items():
        shared = item.get("parameters", [])
        for method in {"get", "post", "put", "patch", "delete"} & set(item):
            operation = item[method]
            ids.append(operation["operationId"])
            declared = {p["name"] for p in [*shared, *operation.get("parameters", [])] if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path)), path
    assert len(ids) == len(set(ids))
    structs = {k.spec.__name__ for k in kinds} | {"Metadata", "Problem"}
    for kind in kinds:
        assert schemas[kind.name]["properties"]["kind"] == {"const": kind.name}
        assert kind.name not in structs, "a kind's schema would hide a struct's"
        assert schemas[kind.name]["properties"]["spec"]["$ref"].rpartition("/")[2] in schemas
        assert f"/api/v1/{kind.plural}" in doc["paths"]
        assert (f"/api/v1/namespaces/{{namespace}}/{kind.plural}" in doc["paths"]) is kind.namespaced
