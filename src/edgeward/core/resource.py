"""The envelope of everything a person declares, and its validation.

A plain document comes in (from YAML, JSON, a store), a typed :class:`Resource` goes out or an error that names the
resource, the field and the remedy. Pure: no I/O, no clock; uid and time are stamped by the store.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, cast

import msgspec

from edgeward.core.errors import EdgewardError, Invalid, TooLarge
from edgeward.core.misfit import invalid_from
from edgeward.core.registry import Kind, kinds, redact

API_VERSION = "edgeward/v1"
#: A document larger than this is refused before it is parsed.
MAX_DOCUMENT = 1024 * 1024
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN)
_LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
#: The namespace part of a key of a kind that has none.
CLUSTER = "_"

Name = Annotated[str, msgspec.Meta(description="DNS label: lower-case letters, digits and -, at most 63")]
ConflictRule = Literal["cloud", "edge", "newest"]


class OwnerReference(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The owner with whose deletion this resource is deleted too."""

    kind: str
    name: str
    uid: str = ""
    namespace: str = ""


class Metadata(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Who a resource is. The fields from ``uid`` on are written by the system."""

    name: Annotated[str, msgspec.Meta(description="Unique within kind and namespace; a DNS label")]
    namespace: Annotated[str, msgspec.Meta(description="Where the name is unique; `default` when left out")] = ""
    labels: Annotated[dict[str, str], msgspec.Meta(description="Short values to select by")] = {}
    annotations: Annotated[dict[str, str], msgspec.Meta(description="Free text for tools and people")] = {}
    conflict: Annotated[
        ConflictRule,
        msgspec.Meta(description="Who wins when hub and site both changed it while the link was cut"),
    ] = "cloud"
    uid: str = ""
    resourceVersion: str = ""
    generation: int = 0
    creationTimestamp: str = ""
    updateTimestamp: str = ""
    deletionTimestamp: str = ""
    finalizers: list[str] = []
    ownerReferences: list[OwnerReference] = []


class Key(msgspec.Struct, frozen=True, order=True):
    """A resource's identity. ``namespace`` is ``_`` for kinds without one."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return (
            f"{self.kind}/{self.name}"
            if self.namespace in (CLUSTER, "default")
            else (f"{self.kind}/{self.namespace}/{self.name}")
        )


class Resource(msgspec.Struct, kw_only=True):
    """One declared object; ``spec`` is the kind's struct, ``status`` is written by the system only."""

    kind: str
    metadata: Metadata
    spec: Any
    apiVersion: str = API_VERSION
    status: dict[str, Any] = {}

    @property
    def key(self) -> Key:
        return Key(self.kind, self.metadata.namespace or CLUSTER, self.metadata.name)

    @property
    def revision(self) -> int:
        return int(self.metadata.resourceVersion or 0)

    def document(self, *, show_secrets: bool = True) -> dict[str, Any]:
        """The plain document as the API gives it."""
        doc = cast(dict[str, Any], msgspec.to_builtins(self))
        if not show_secrets:
            doc = redact(doc)
        return {k: doc[k] for k in ("apiVersion", "kind", "metadata", "spec", "status")}


def check_name(name: object, path: str, resource: str = "") -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name) if not isinstance(name, str) or len(name) < 80 else repr(name[:77] + "...")
        raise Invalid(
            f"{shown} is no valid name",
            resource=resource,
            field=path,
            remedy="use lower-case letters, digits and '-', starting and ending with a letter or digit, at most 63",
        )
    return name


def _check_metadata(meta: Metadata, kind: Kind, what: str) -> None:
    check_name(meta.name, "$.metadata.name", what)
    if kind.namespaced:
        check_name(meta.namespace, "$.metadata.namespace", what)
    elif meta.namespace:
        raise Invalid(
            f"a {kind.name} has no namespace", resource=what, field="$.metadata.namespace", remedy="remove it"
        )
    for key, value in meta.labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise Invalid(
                f"{key[:80]!r} is no label key",
                resource=what,
                field="$.metadata.labels",
                remedy="letters, digits, '-', '_', '.', optionally behind a 'domain/' prefix",
            )
        if not _LABEL_VALUE.fullmatch(value):
            raise Invalid(
                f"{value[:80]!r} is no label value",
                resource=what,
                field=f"$.metadata.labels.{key}",
                remedy="at most 63 letters, digits, '-', '_', '.'",
            )


def parse_revision(text: str) -> int | None:
    """The revision that ``text`` writes, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


_TOP = {"apiVersion", "kind", "metadata", "spec", "status"}


def decode(doc: object, *, namespace: str = "default") -> Resource:
    """The typed resource of a plain document; raises :class:`Invalid`.

    ``namespace`` is used when a namespaced document names none.
    """
    if not isinstance(doc, Mapping):
        raise Invalid(f"a document is a mapping, this is {type(doc).__name__}", field="$")
    kind_name = doc.get("kind")
    name = doc.get("metadata", {}).get("name", "") if isinstance(doc.get("metadata"), Mapping) else ""
    what = (
        f"{kind_name}/{name}" if isinstance(kind_name, str) and isinstance(name, str) and name else str(kind_name or "")
    )
    for required in ("apiVersion", "kind", "metadata"):
        if required not in doc:
            raise Invalid("is required", resource=what, field=f"$.{required}", remedy="add it")
    if doc["apiVersion"] != API_VERSION:
        raise Invalid(
            f"{doc['apiVersion']!r} is not served", resource=what, field="$.apiVersion", remedy=f"write {API_VERSION}"
        )
    if not isinstance(kind_name, str):
        raise Invalid("expected a string", field="$.kind")
    kind = kinds.get(kind_name)
    for field in doc:
        if field not in _TOP:
            near = difflib.get_close_matches(str(field), sorted(_TOP), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "spec fields go below 'spec:'"
            raise Invalid("unknown field", resource=what, field=f"$.{field}", remedy=hint)
    try:
        meta = msgspec.convert(doc["metadata"], Metadata)
    except msgspec.ValidationError as e:
        raise invalid_from(e, Metadata, prefix="$.metadata", resource=what, doc=doc["metadata"]) from None
    if kind.namespaced and not meta.namespace:
        meta.namespace = namespace
    _check_metadata(meta, kind, what)
    declared = doc.get("spec") if doc.get("spec") is not None else {}
    try:
        spec = msgspec.convert(declared, kind.spec)
    except msgspec.ValidationError as e:
        raise invalid_from(e, kind.spec, prefix="$.spec", resource=what, doc=declared) from None
    status = doc.get("status") or {}
    if not isinstance(status, dict):
        raise Invalid("expected an object", resource=what, field="$.status")
    resource = Resource(kind=kind_name, metadata=meta, spec=spec, status=status)
    try:
        kind.check(resource)
    except EdgewardError as e:
        e.resource = e.resource or what
        raise
    return resource


class Stored(msgspec.Struct, omit_defaults=True):
    """The form on disk and between hub and node: plain spec plus the version of its schema."""

    kind: str
    metadata: Metadata
    spec: dict[str, Any]
    schema: int = 1


def to_stored(resource: Resource) -> Stored:
    kind = kinds.get(resource.kind)
    return Stored(resource.kind, resource.metadata, msgspec.to_builtins(resource.spec), kind.schema)


def from_stored(stored: Stored, status: dict[str, Any] | None = None) -> Resource:
    """Reads what any earlier release stored, by the kind's upgrades."""
    kind = kinds.get(stored.kind)
    spec = kind.upgrade(stored.spec, stored.schema)
    what = f"{stored.kind}/{stored.metadata.name}"
    try:
        typed = msgspec.convert(spec, kind.spec)
    except msgspec.ValidationError as e:
        raise invalid_from(e, kind.spec, prefix="$.spec", resource=what, doc=spec) from None
    return Resource(kind=stored.kind, metadata=stored.metadata, spec=typed, status=status or {})


def check_stored(stored: Stored) -> None:
    """Names, labels and times of what another machine says: as :func:`decode` takes them. Raises ``Invalid``.

    A name is a folder's name somewhere, so this is for whatever comes from who may have been broken into.
    """
    what = f"{stored.kind}/{stored.metadata.name[:80]}"
    _check_metadata(stored.metadata, kinds.get(stored.kind), what)
    if len(stored.metadata.uid) > 64:
        raise Invalid("is no uid", resource=what, field="$.metadata.uid")
    for name in ("creationTimestamp", "updateTimestamp", "deletionTimestamp"):
        text = getattr(stored.metadata, name)
        if text and not _is_time(text):
            raise Invalid("is no time", resource=what, field=f"$.metadata.{name}")


def _is_time(text: str) -> bool:
    try:
        return len(text) < 40 and datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() >= 0
    except (ValueError, OverflowError):
        return False


def check_key(key: Key) -> None:
    """Whether an object can be called so. Raises ``Invalid``."""
    check_name(key.name, "$.metadata.name", str(key)[:200])
    if kinds.get(key.kind).namespaced:
        check_name(key.namespace, "$.metadata.namespace", str(key)[:200])
    elif key.namespace != CLUSTER:
        raise Invalid("has no namespace", resource=str(key)[:200], field="$.metadata.namespace")


_stored_encoder = msgspec.json.Encoder()
_stored_decoder = msgspec.json.Decoder(Stored)


def write_stored(stored: Stored, what: str, *, slack: int = 1) -> bytes:
    """The bytes of a stored form; ``slack``: how many times the bound they may have (sealed values are longer)."""
    data = _stored_encoder.encode(stored)
    if len(data) > MAX_DOCUMENT * slack:
        raise TooLarge(f"the document has {len(data)} bytes", resource=what, remedy=f"at most {MAX_DOCUMENT} bytes")
    return data


def read_stored(data: bytes) -> Stored:
    return _stored_decoder.decode(data)


def encode_stored(resource: Resource) -> bytes:
    return write_stored(to_stored(resource), str(resource.key))


def decode_stored(data: bytes, status: dict[str, Any] | None = None) -> Resource:
    return from_stored(read_stored(data), status)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: ``patch`` applied to ``target``; neither is changed."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def make_patch(old: Any, new: Any) -> Any:
    """The RFC 7396 patch that turns ``old`` into ``new`` (both mappings)."""
    patch: dict[str, Any] = {}
    for key in old:
        if key not in new:
            patch[key] = None
    for key, value in new.items():
        if key not in old:
            patch[key] = value
        elif old[key] != value:
            both = isinstance(old[key], Mapping) and isinstance(value, Mapping)
            patch[key] = make_patch(old[key], value) if both else value
    return patch
