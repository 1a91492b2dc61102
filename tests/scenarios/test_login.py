"""Signing in with the organisation's account: a real hub, a real issuer on loopback, the real program."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import string
import sys
from pathlib import Path
from typing import Any

import httpx
from tests.core.pair import free_port
from tests.hub.issuer import Key, issuer
from tests.scenarios.test_routes import running

from edgeward.hub.main import Hub

LOGIN = "/api/v1/oidc/login"


async def program(context: Path, *args: str, code: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if k != "EDGEWARD_TOKEN"} | {"EDGEWARD_CONTEXT": str(context)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edgeward", *args, env=env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == code, (args, process.returncode, err.decode())
    return out.decode() + err.decode()


def _negated(token: str) -> str:
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
    other = raw[:32] + (order - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    return f"{signed}.{base64.urlsafe_b64encode(other).decode().rstrip('=')}"


def _respelled(token: str) -> str:
    """The same 64 bytes of signature: of the last character's six bits four say nothing."""
    letters = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    return token[:-1] + letters[letters.index(token[-1]) ^ 1]


def test_a_person_signs_in_works_and_signs_out(tmp_path: Path) -> None:
    async def body(idp: Any) -> None:
        folder, port = tmp_path / "hub", free_port()
        folder.mkdir()
        roles = {"boss": "admin", "dev": "viewer"}
        oidc = {"issuer": idp.url, "clientId": "edgeward", "roles": roles}
        (folder / "hub.json").write_text(json.dumps({"port": port, "oidc": oidc}))
        async with running(Hub(folder)) as hub:
            url, ca = f"https://127.0.0.1:{port}", str(folder / "identity" / "ca.crt")
            context = tmp_path / "context.json"
            context.write_text(json.dumps({"hub_url": url, "ca_file": ca}))
            said = await program(context, "login")
            assert "WXYZ" in said and "signed in as eve@example.org (role viewer)" in said
            assert context.stat().st_mode & 0o077 == 0
            assert "role viewer" in await program(context, "whoami")
            assert "may not" in await program(context, "delete", "namespace", "default", code=3)
            (made,) = hub.store.items("AccessToken")
            assert made.spec.sites == ["*"] and "eve@example.org" in made.spec.description
            await program(context, "logout")
            assert hub.store.items("AccessToken") == []
            assert "wrong" in await program(context, "whoami", code=3)

            # the hub's own token is not written over
            own = tmp_path / "own.json"
            token = (folder / "identity" / "admin.token").read_text().strip()
            own.write_text(json.dumps({"hub_url": url, "ca_file": ca, "token": token}))
            assert "way back in" in await program(own, "login", code=3)
            await program(own, "logout", code=3)
            idp.answers = []
            await program(own, "login", "--save", str(tmp_path / "mine.json"))
            assert json.loads(own.read_text())["token"] == token

            # refused at the issuer; known there, but nobody here; a new key of the issuer
            idp.answers = ["access_denied"]
            assert "access_denied" in await program(context, "login", code=3)
            idp.person["groups"] = ["strangers"]
            assert "has a role here" in await program(context, "login", code=3)
            idp.person["groups"] = ["dev", "boss"]
            idp.keys.append(Key("two", "ES256"))
            sign_in = hub.sign_in
            sign_in._fetched -= 60
            assert "role admin" in await program(context, "login")

            async with httpx.AsyncClient(
                verify=ssl.create_default_context(cafile=ca), base_url=url, timeout=30
            ) as http:
                # a token is good once
                good = idp.keys[-1].sign(idp.claims(sub="u-2"))
                answers = await asyncio.gather(*(http.post(LOGIN, json={"idToken": good}) for _ in range(4)))
                assert sorted(a.status_code for a in answers) == [201, 401, 401, 401]
                (made,) = [a.json() for a in answers if a.status_code == 201]
                # however its signature is written: (r, -s) is good too (ECDSA), base64 ignores the last bits
                for other in (_negated(good), _respelled(good)):
                    assert (await http.post(LOGIN, json={"idToken": other})).status_code == 401
                # nor when its bearer has signed out; what is remembered is in the store, which all processes share
                bearer = {"Authorization": f"Bearer {made['token']}"}
                assert (await http.post("/api/v1/logout", headers=bearer)).status_code == 200
                assert (await http.post(LOGIN, json={"idToken": good})).status_code == 401
                # a person's sign-ins are bounded
                for n in range(12):
                    more = idp.keys[-1].sign(idp.claims(sub="u-2", n=n))
                    assert (await http.post(LOGIN, json={"idToken": more})).status_code == 201
                of = [t for t in hub.store.items("AccessToken") if t.metadata.labels["signed-in-as"] ==
                      hub.store.items("AccessToken")[-1].metadata.labels["signed-in-as"]]  # fmt: skip
                assert len(of) <= 8
                for sent, status in (({}, 422), ({"idToken": 1}, 422), ([], 422)):
                    assert (await http.post(LOGIN, json=sent)).status_code == status
                bad = [(await http.post(LOGIN, json={"idToken": f"a.b.{n}"})).status_code for n in range(60)]
                assert set(bad) == {401, 429}
                before = len(idp.asked)
                more = idp.keys[-1].sign(idp.claims(sub="u-2", n=99))
                assert (await http.post(LOGIN, json={"idToken": more})).status_code == 201, "good ones go on"
                assert len(idp.asked) == before, "nobody makes the hub ask the issuer again and again"

    with issuer() as idp:
        asyncio.run(body(idp))


def test_a_hub_without_an_issuer_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        folder, port = tmp_path / "hub", free_port()
        folder.mkdir()
        (folder / "hub.json").write_text(json.dumps({"port": port}))
        async with running(Hub(folder)):
            context = tmp_path / "context.json"
            ca = str(folder / "identity" / "ca.crt")
            context.write_text(json.dumps({"hub_url": f"https://127.0.0.1:{port}", "ca_file": ca}))
            assert "no issuer" in await program(context, "login", code=5)

    asyncio.run(body())
