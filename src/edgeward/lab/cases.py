"""What `edgeward function test` checks: events from files, and what their answers should be.

In comes a document of a function's ``events/`` folder, out goes a :class:`Case`; in comes how the call ended, out go
the expectations that did not hold, in words. A structured CloudEvent (a document with ``specversion``), as it was
recorded somewhere, is a case as it stands: it must be answered with a status below 400. Pure but for the reading of
a case's data from a file beside it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core.declared import Declared
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.invocation import MAX_BODY, STATUS, Event, Http
from edgeward.core.manifest import Manifest, read_files
from edgeward.core.misfit import invalid_from

_JSON = "application/json"
#: CloudEvents 1.0 attributes that have a field of their own; others are extensions.
_ATTRIBUTES = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data", "data_base64"}


class CaseHttp(Declared):
    """The HTTP request that the event is made of, as a Route would."""

    method: str = "POST"
    path: str = "/"
    query: str = ""
    headers: dict[str, str] = {}
    client: str = "127.0.0.1"


class CaseEvent(Declared):
    """The event; what is left out has a value that tells a reader it is a test's."""

    data: Annotated[Any, Meta(description="Text, or anything else as JSON")] = None
    file: Annotated[str, Meta(description="The data: a file beside this one")] = ""
    id: str = ""
    source: str = "edgeward:test"
    type: str = "edgeward.test"
    subject: str = ""
    time: str = ""
    datacontenttype: str = ""
    extensions: dict[str, str] = {}
    http: CaseHttp | None = None


class Expect(Declared):
    """What must be so; what is left out may be anything (but a status below 400, or the error that is named)."""

    status: Annotated[Annotated[int, Meta(ge=100, le=599)] | None, Meta(description="Of the answer")] = None
    error: Annotated[str, Meta(description="How the call must fail: timeout, memory, crashed, error, ...")] = ""
    body: Annotated[str | None, Meta(description="The whole answer, as text")] = None
    json: Annotated[Any, Meta(description="The whole answer, as JSON")] = msgspec.UNSET
    has: Annotated[Any, Meta(description="JSON: these fields of the answer, whatever else it has")] = msgspec.UNSET
    contains: Annotated[list[str], Meta(description="Texts that are in the answer")] = []
    matches: Annotated[str, Meta(description="A regular expression that is found in the answer")] = ""
    headers: Annotated[dict[str, str], Meta(description="Header fields of the answer")] = {}
    log: Annotated[list[str], Meta(description="Texts that the call writes to its log")] = []


class CaseSpec(Declared):
    """One document of an event file."""

    name: str = ""
    function: Annotated[str, Meta(description="Which one, where the manifest has several")] = ""
    event: CaseEvent = msgspec.field(default_factory=CaseEvent)
    expect: Expect = msgspec.field(default_factory=Expect)


class Case(msgspec.Struct):
    name: str
    function: str
    event: Event
    expect: Expect


class Outcome(msgspec.Struct):
    """How a call ended."""

    status: int = 0
    headers: list[tuple[str, str]] = []
    body: bytes = b""
    #: The kind of the failure, and its words; empty when it was answered.
    error: str = ""
    message: str = ""
    log: list[str] = []


def read_cases(paths: Sequence[Path]) -> list[Case]:
    """Every case of files and folders, in their order. Raises ``Invalid`` that names file, line and field."""
    cases: list[Case] = []
    for manifest in read_files(paths):
        try:
            cases.append(_case(manifest, len(cases)))
        except EdgewardError as e:
            e.file, e.line = e.file or manifest.file, e.line or manifest.line_of(e.field)
            raise
    return cases


def _case(manifest: Manifest, n: int) -> Case:
    file = Path(manifest.file)
    doc = manifest.doc
    if isinstance(doc, dict) and "specversion" in doc:
        return Case(f"{file.stem} {doc.get('id', '')}".strip(), "", _recorded(doc), Expect())
    try:
        spec = msgspec.convert(doc, CaseSpec)
    except msgspec.ValidationError as e:
        raise invalid_from(e, CaseSpec, prefix="$", resource="", doc=doc) from None
    _check(spec.expect)
    return Case(spec.name or file.stem, spec.function, _event(spec.event, file.parent, f"case-{n + 1}"), spec.expect)


def _check(expect: Expect) -> None:
    if expect.error and expect.error not in STATUS:
        raise Invalid(
            f"there is no error {expect.error!r}", field="$.expect.error", remedy=f"one of {', '.join(STATUS)}"
        )
    try:
        re.compile(expect.matches)
    except re.error as e:
        raise Invalid(f"is no regular expression: {e}", field="$.expect.matches") from None


def _data(value: Any) -> tuple[bytes, str]:
    """Data as a document gives it, and its type."""
    if value is None:
        return b"", ""
    if isinstance(value, str):
        return value.encode(), "text/plain; charset=utf-8"
    return msgspec.json.encode(value), _JSON


def _event(given: CaseEvent, folder: Path, id: str) -> Event:
    data, type = _data(given.data)
    if given.file:
        if given.data is not None:
            raise Invalid("the data is given twice", field="$.event.file", remedy="data: or file:, not both")
        path = folder / given.file
        try:
            with path.open("rb") as f:
                data, type = f.read(MAX_BODY + 1), ""
        except OSError as e:
            raise Invalid(
                f"{path}: {e.strerror}", field="$.event.file", remedy="a path from this file's folder"
            ) from None
    if len(data) > MAX_BODY:
        raise Invalid(f"has more than {MAX_BODY} bytes", field="$.event", remedy="events are at most 6Mi")
    http = None
    if given.http is not None:
        h = given.http
        http = Http(h.method, h.path, h.query, [(k.lower(), v) for k, v in h.headers.items()], h.client)
    return Event(
        given.id or id, given.source, given.type, data, given.datacontenttype or type, given.subject, given.time,
        given.extensions, http,
    )  # fmt: skip


def _recorded(doc: dict[str, Any]) -> Event:
    """CloudEvents 1.0, JSON format, section 3."""
    for name in ("id", "source", "type"):
        if not isinstance(doc.get(name), str) or not doc[name]:
            raise Invalid("a CloudEvent has one", field=f"$.{name}", remedy="a text that is not empty")
    if doc["specversion"] != "1.0":
        raise Invalid("is not 1.0", field="$.specversion", remedy='write specversion: "1.0"')
    if "data_base64" in doc:
        try:
            data, type = base64.b64decode(str(doc["data_base64"]), validate=True), ""
        except binascii.Error:
            raise Invalid("is no base64", field="$.data_base64") from None
    else:
        data, type = _data(doc.get("data"))
        if isinstance(doc.get("data"), str) and str(doc.get("datacontenttype", _JSON)).startswith(_JSON):
            data, type = msgspec.json.encode(doc["data"]), _JSON
    return Event(
        doc["id"],
        doc["source"],
        doc["type"],
        data,
        str(doc.get("datacontenttype", type)),
        str(doc.get("subject", "")),
        str(doc.get("time", "")),
        {k: str(v) for k, v in doc.items() if k not in _ATTRIBUTES},
    )


def judge(expect: Expect, got: Outcome) -> list[str]:
    """What did not hold, each in a sentence; empty: the case passed."""
    wrong = _status(expect, got)
    if wrong and got.error:
        return wrong  # there is no answer to compare
    text = got.body.decode(errors="replace")
    if expect.body is not None and text != expect.body:
        wrong.append(f"body: {_short(text)}, expected {_short(expect.body)}")
    wrong += _as_json(expect, got.body)
    wrong += [f"body: {_short(text)} does not contain {part!r}" for part in expect.contains if part not in text]
    if expect.matches and not re.search(expect.matches, text):
        wrong.append(f"body: {_short(text)} does not match {expect.matches!r}")
    fields = {k.lower(): v for k, v in got.headers}
    for name, value in expect.headers.items():
        if fields.get(name.lower()) != value:
            wrong.append(f"header {name}: {fields.get(name.lower())!r}, expected {value!r}")
    wrong += [f"log: no line has {part!r}" for part in expect.log if not any(part in line for line in got.log)]
    return wrong


def _status(expect: Expect, got: Outcome) -> list[str]:
    if expect.error:
        said = got.error or f"answered with status {got.status}"
        return [] if got.error == expect.error else [f"{said}, expected the error {expect.error}"]
    if got.error and (expect.status is None or STATUS.get(got.error) != expect.status):
        return [f"{got.error}: {got.message}"]
    if expect.status is None:
        return [f"status: {got.status}, expected one below 400"] if got.status >= 400 else []
    status = STATUS[got.error] if got.error else got.status
    return [] if status == expect.status else [f"status: {got.status}, expected {expect.status}"]


def _as_json(expect: Expect, body: bytes) -> list[str]:
    if expect.json is msgspec.UNSET and expect.has is msgspec.UNSET:
        return []
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [f"body: {_short(body.decode(errors='replace'))} is no JSON"]
    wrong = []
    if expect.json is not msgspec.UNSET and not _same(value, expect.json):
        wrong.append(f"json: {_text(value)}, expected {_text(expect.json)}")
    if expect.has is not msgspec.UNSET:
        wrong += _lacks(value, expect.has, "$")
    return wrong


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _lacks(value: Any, wanted: Any, at: str) -> list[str]:
    if not isinstance(wanted, dict):
        return [] if _same(value, wanted) else [f"{at}: {_text(value)}, expected {_text(wanted)}"]
    if not isinstance(value, dict):
        return [f"{at}: {_text(value)} has no fields"]
    wrong = []
    for key, part in wanted.items():
        if key not in value:
            wrong.append(f"{at}.{key}: is not there")
        else:
            wrong += _lacks(value[key], part, f"{at}.{key}")
    return wrong


def _text(value: Any) -> str:
    return _cut(msgspec.json.encode(value).decode())


def _short(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
