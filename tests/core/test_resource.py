"""The envelope: what is taken, what is refused and how it says so, what survives the store."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import Invalid, TooLarge
from edgeward.core.registry import kinds
from edgeward.core.resource import (
    MAX_DOCUMENT,
    NAME_PATTERN,
    Key,
    Resource,
    decode,
    decode_stored,
    encode_stored,
    from_stored,
    make_patch,
    merge_patch,
    to_stored,
)
from edgeward.hub.kinds import load

load()

NAMES = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda n: not n.endswith("\n"))
LABEL_VALUES = st.from_regex(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", fullmatch=True)
JSON = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("abc", max_size=2), x, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("abc", max_size=2), JSON, max_size=4)


def config(**changes: Any) -> dict[str, Any]:
    doc = {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": "web"}, "spec": {"data": {"k": "v"}}}
    return {k: v for k, v in {**doc, **changes}.items() if v is not None}


def refusal(doc: object) -> Invalid:
    with pytest.raises(Invalid) as caught:
        decode(doc)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"apiVersion": None}, "$.apiVersion", "add it"),
        ({"apiVersion": "edgeward/v2"}, "$.apiVersion", "write edgeward/v1"),
        ({"metadata": None}, "$.metadata", "add it"),
        ({"metadata": []}, "$.metadata", ""),
        ({"metadata": {}}, "$.metadata.name", "add it"),
        ({"metadata": {"name": 5}}, "$.metadata.name", "quotes"),
        ({"metadata": {"name": "web", "label": {}}}, "$.metadata.label", "'labels'"),
        ({"metadata": {"name": "web", "conflict": "mine"}}, "$.metadata.conflict", "cloud, edge, newest"),
        ({"metadata": {"name": "web", "namespace": "A"}}, "$.metadata.namespace", "lower-case"),
        ({"metadata": {"name": "web", "labels": {"-a": "b"}}}, "$.metadata.labels", "prefix"),
        ({"metadata": {"name": "web", "labels": {"a": "b c"}}}, "$.metadata.labels.a", "63"),
        ({"metadata": {"name": "web", "labels": {"a": "b\n"}}}, "$.metadata.labels.a", "63"),
        ({"metadata": {"name": "web", "labels": {"a\n": "b"}}}, "$.metadata.labels", "prefix"),
        ({"metadata": {"name": "web", "ownerReferences": [{"kind": "App"}]}},
         "$.metadata.ownerReferences[0].name", "add it"),
        ({"specs": {}}, "$.specs", "'spec'"),
        ({"replicas": 3}, "$.replicas", "below 'spec:'"),
        ({"spec": []}, "$.spec", ""),
        ({"spec": {"dat": {}}}, "$.spec.dat", "'data'"),
        ({"spec": {"zzz": {}}}, "$.spec.zzz", "known fields: data"),
        ({"spec": {"data": {"k": 5}}}, "$.spec.data.k", "quotes"),
        ({"spec": {"data": {"a/b": "x"}}}, "$.spec.data", "letters"),
        ({"status": "good"}, "$.status", ""),
    ],
)  # fmt: skip
def test_a_refusal_names_resource_field_and_remedy(changes: dict[str, Any], field: str, remedy: str) -> None:
    e = refusal(config(**changes))
    assert e.field == field
    assert remedy in e.remedy
    assert bool(e.remedy) == bool(remedy)
    assert e.resource == ("Config/web" if changes.get("metadata", {"name": "web"}) == {"name": "web"} else e.resource)
    assert e.resource.startswith("Config")


@pytest.mark.parametrize("doc", [None, [], "x", 3, {}, {"kind": []}, {"apiVersion": "edgeward/v1"}])
def test_what_is_no_document(doc: object) -> None:
    assert refusal(doc).field.startswith("$")


def test_the_kind_must_be_one_of_ours() -> None:
    e = refusal(config(kind="Confg"))
    assert (e.field, "Config" in e.remedy, "Secret" in e.remedy) == ("$.kind", True, True)
    assert refusal(config(kind=["Config"])).field == "$.kind"


@pytest.mark.parametrize("bad", ["", "A", "a.b", "a_b", "-a", "a-", "a/b", "..", "a" * 64, "ä", "a\n", "a b", "a\0"])
def test_no_name(bad: str) -> None:
    e = refusal(config(metadata={"name": bad}))
    assert e.field == "$.metadata.name"
    assert "at most 63" in e.remedy


def test_a_long_bad_name_is_not_repeated_in_full() -> None:
    assert len(refusal(config(metadata={"name": "x" * 100_000})).message) < 200


def test_nested_fields_are_named_by_their_path() -> None:
    app = {
        "apiVersion": "edgeward/v1",
        "kind": "App",
        "metadata": {"name": "a"},
        "spec": {"process": {"comand": ["x"]}},
    }
    e = refusal(app)
    assert (e.resource, e.field) == ("App/a", "$.spec.process.comand")
    site = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}, "spec": {}}
    e = refusal({**site, "spec": {"coordinates": {"lat": 1, "long": 2}}})
    assert (e.field, e.remedy) == ("$.spec.coordinates.long", "did you mean 'lon'?")
    e = refusal({**site, "spec": {"prefixes": ["10.0.0.0/8", "x"]}})
    assert (e.resource, e.field) == ("Site/s", "$.spec.prefixes[1]")
    e = refusal({**site, "metadata": {"name": "s", "namespace": "default"}})
    assert (e.field, e.remedy) == ("$.metadata.namespace", "remove it")


def test_defaults_are_filled_in_and_nothing_is_shared() -> None:
    one, two = decode(config(spec=None)), decode(config(spec=None), namespace="line-3")
    assert (one.metadata.namespace, two.metadata.namespace) == ("default", "line-3")
    assert (str(one.key), str(two.key)) == ("Config/web", "Config/line-3/web")
    assert one.revision == 0
    one.spec.data["k"] = "v"
    one.status["phase"] = "x"
    one.metadata.labels["a"] = "b"
    assert (two.spec.data, two.status, two.metadata.labels) == ({}, {}, {})
    assert decode(config(spec=None)).document()["spec"] == {}


def test_secrets_are_blanked_on_request_only() -> None:
    secret = decode(config(kind="Secret", spec={"data": {"password": "geheim"}}))
    assert secret.document()["spec"] == {"data": {"password": "geheim"}}
    assert secret.document(show_secrets=False)["spec"] == {"data": {"password": "***"}}
    assert "geheim" not in str(refusal(config(kind="Secret", spec={"data": {"a/b": "geheim"}})))
    assert decode(config(kind="Secret", spec=None)).document(show_secrets=False)["spec"] == {}


@given(
    name=NAMES,
    namespace=NAMES,
    labels=st.dictionaries(NAMES, LABEL_VALUES, max_size=3),
    annotations=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    data=st.dictionaries(NAMES, st.text(max_size=20), max_size=3),
    status=OBJECTS,
)
def test_a_resource_survives_its_document_and_the_store(
    name: str, namespace: str, labels: Any, annotations: Any, data: Any, status: Any
) -> None:
    meta = {"name": name, "namespace": namespace, "labels": labels, "annotations": annotations}
    resource = decode(config(metadata=meta, spec={"data": data}, status=status))
    assert resource.key == Key("Config", namespace, name)
    assert decode(resource.document()) == resource
    assert decode_stored(encode_stored(resource), status) == resource
    assert msgspec.json.decode(msgspec.json.encode(resource.document())) == resource.document()


@pytest.mark.parametrize("kind", [k.name for k in kinds if k.example])
def test_every_kind_takes_its_own_example_and_gives_it_back(kind: str) -> None:
    from edgeward.core.manifest import load as load_yaml

    (m,) = load_yaml(kinds.get(kind).example)
    resource = decode(m.doc)
    assert resource.kind == kind
    assert decode(resource.document()) == resource
    assert decode_stored(encode_stored(resource)) == resource


@given(st.recursive(JSON, lambda x: st.fixed_dictionaries({}, optional=dict.fromkeys(
    ("apiVersion", "kind", "metadata", "spec", "status", "name"), x | st.sampled_from(["edgeward/v1", "Config", "a"])
))))  # fmt: skip
def test_any_document_is_decoded_or_refused(doc: Any) -> None:
    for tried in (doc, config(metadata=doc), config(spec=doc), config(status=doc)):
        try:
            assert isinstance(decode(tried), Resource)
        except Invalid as e:
            assert e.field.startswith("$")


def test_too_large_to_be_stored() -> None:
    size = len(encode_stored(decode(config(spec={"data": {"k": ""}}))))
    assert len(encode_stored(decode(config(spec={"data": {"k": "x" * (MAX_DOCUMENT - size)}})))) == MAX_DOCUMENT
    with pytest.raises(TooLarge) as caught:
        encode_stored(decode(config(spec={"data": {"k": "x" * (MAX_DOCUMENT - size + 1)}})))
    assert caught.value.resource == "Config/web"
    assert str(MAX_DOCUMENT) in caught.value.remedy


def test_what_a_newer_release_stored_is_not_guessed_at() -> None:
    stored = to_stored(decode(config()))
    with pytest.raises(Invalid, match="schema 2"):
        from_stored(msgspec.structs.replace(stored, schema=2))
    with pytest.raises(Invalid) as caught:
        from_stored(msgspec.structs.replace(stored, spec={"data": 3}))
    assert (caught.value.resource, caught.value.field) == ("Config/web", "$.spec.data")


@given(OBJECTS, OBJECTS)
def test_a_made_patch_turns_the_old_into_the_new(old: Any, new: Any) -> None:
    before = msgspec.json.encode(old)
    patch = make_patch(old, new)
    got = merge_patch(old, patch)
    assert got == new
    assert msgspec.json.decode(msgspec.json.encode(got)) == got
    assert msgspec.json.encode(old) == before, "neither is changed"
    assert make_patch(new, new) == {}


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}), ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}), ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}), ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}), (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]), ({"a": "foo"}, None, None), ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}), ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)  # fmt: skip
def test_merge_patch_as_the_rfc_says(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result
