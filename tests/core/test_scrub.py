"""What may be a secret does not pass; what is none does."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.nkeys import KeyPair, mint
from edgeward.core.scrub import HIDDEN, Scrubber
from edgeward.core.seal import new_keys

PEM = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    .decode()
)
OPERATOR = KeyPair.create("operator")
USER = KeyPair.create("user")


@pytest.mark.parametrize(
    "secret",
    [
        PEM.strip(),
        PEM[:100],  # cut off by a log's tail
        OPERATOR.seed,
        USER.seed,
        mint(OPERATOR, USER.public, "n", {"type": "user"}),
        new_keys()[0].text(),
        "ew_Zx81kq-90aPl_QmTTx",
        "ewj_eyJ2IjoxfQ-90aPl",
    ],
    ids=["pem", "pem-cut", "operator", "user", "jwt", "recovery", "token", "join"],
)
@pytest.mark.parametrize("around", ["{}", 'a "{}" b', "x={} y", "line\n{}\nline", "(see {})"])
def test_what_looks_like_a_key_goes(secret: str, around: str) -> None:
    found = Scrubber().text(around.format(secret))
    assert HIDDEN in found
    for line in secret.splitlines():
        if "-----" not in line:
            assert line not in found


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("nats://me:pa55word@host:4222/x", f"nats://{HIDDEN}@host:4222/x"),
        ('{"password": "a b\\"c", "x": 1}', f'{{"password": {HIDDEN}, "x": 1}}'),
        ("mqtt_password=hunter2, next", f"mqtt_password={HIDDEN}, next"),
        ("API_KEY: abc", f"API_KEY: {HIDDEN}"),
        ("Authorization: Bearer abcdefgh.x", f"Authorization: Bearer {HIDDEN}"),
        ("the token is missing or wrong", "the token is missing or wrong"),
        ("see https://host/path?x=1", "see https://host/path?x=1"),
        ("no seeds here", "no seeds here"),
    ],
)
def test_values_by_their_name(text: str, want: str) -> None:
    assert Scrubber().text(text) == want


@given(st.text(min_size=6), st.text(), st.text())
def test_a_known_value_goes_wherever_it_stands(secret: str, before: str, behind: str) -> None:
    found = Scrubber([secret]).text(before + secret + behind)
    assert secret not in found or secret in HIDDEN


def test_documents() -> None:
    doc = {
        "kind": "App",
        "metadata": {"name": "web", "annotations": {"ci-token": "abcdef"}},
        "spec": {
            "process": {"command": ["run", "--db-password", "x1", "--verbose", "--token=zz99", "ok"]},
            "env": {"PLAIN": "may be one", "N": 1},
            "containers": [{"env": [{"name": "A", "value": "b"}]}],
            "ports": [{"name": "http", "port": 80}],
            "secrets": ["db"],
        },
        "status": {"ready": True, "token": None},
    }
    assert Scrubber(["known-value"]).document(doc) == {
        "kind": "App",
        "metadata": {"name": "web", "annotations": {"ci-token": HIDDEN}},
        "spec": {
            "process": {"command": ["run", "--db-password", HIDDEN, "--verbose", f"--token={HIDDEN}", "ok"]},
            "env": {"PLAIN": HIDDEN, "N": HIDDEN},
            "containers": [{"env": [{"name": "A", "value": HIDDEN}]}],
            "ports": [{"name": "http", "port": 80}],
            "secrets": ["db"],
        },
        "status": {"ready": True, "token": None},
    }
    assert Scrubber(["known-value"]).document(["x known-value"]) == [f"x {HIDDEN}"]
