"""Enrolment over real TLS and a real nats-server: who gets in, who does not, who is cut off, who comes back."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from tests.hub.doors import DAY, OpenHub, open_hub, until

from edgeward.core.certs import NODE_DOMAIN, make_csr, new_key
from edgeward.core.errors import Conflict, Forbidden, Invalid, NotFound, Refused, TooMany, Unreachable
from edgeward.core.identity import HubIdentity, NodeIdentity
from edgeward.core.nkeys import KeyPair, claims_of, creds_text, mint
from edgeward.core.resource import CLUSTER, Key
from edgeward.nodes import enrol_edge
from edgeward.nodes.wire import BeatAnswer, BeatAsk


def run(body: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await body

    asyncio.run(bounded())


def post(hub: OpenHub, path: str, body: bytes, token: str = "", length: int = 0) -> tuple[int, dict[str, Any]]:
    context = ssl.create_default_context(cafile=str(hub.identity.ca_file))
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    headers |= {"Content-Length": str(length)} if length else {}
    request = urllib.request.Request(hub.url + path, body, headers, method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as got:  # noqa: S310
            return got.status, json.loads(got.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_a_box_joins_and_is_linked(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token()
            identity = await hub.join(token)
            node = hub.fleet.store.get(Key("Node", CLUSTER, "box"))
            assert node.spec.site == "plant"
            used = hub.fleet.store.get(Key("JoinToken", CLUSTER, token.name)).status
            assert used["used"] is True
            assert (used["usedFrom"], used["publicKey"]) == ("127.0.0.1", identity.public_key)
            assert (identity.name, identity.lease[1] - identity.lease[0]) == ("box", 90 * DAY)
            cert = x509.load_pem_x509_certificate(identity.certificate.encode())
            cert.verify_directly_issued_by(hub.identity.authority.cert)
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.DNSName) == ["box" + NODE_DOMAIN], "nothing a hub could be called"
            assert (identity.tls_file.stat().st_mode & 0o777) == 0o600
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)
            config = json.loads((identity.directory.parent / "node.json").read_text())
            assert (config["node"], config["site"], config["hub"]["port"]) == ("box", "plant", hub.port)
            # the secret is nowhere at the hub, and the seed never left the box
            seed = (identity.directory / "node.seed").read_text().strip()
            hub_files = [p for p in tmp_path.rglob("*") if p.is_file() and "boxes" not in p.parts]
            for secret in (token.secret, token.secret.hex().encode(), seed.encode()):
                assert not any(secret in p.read_bytes() for p in hub_files)
            acts = [(a["verb"], a["name"], a["outcome"]) for a in hub.audit.items()]  # type: ignore[attr-defined]
            assert ("enrol", "box", "done") in acts

    run(body())


def test_a_token_is_good_once_for_one_name_for_a_while(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token(ttl=60)
            with pytest.raises(Forbidden, match="for node 'box', not for 'other'"):
                await hub.join(token, node="other")
            with pytest.raises(Forbidden, match="for site 'plant', not for 'shop'"):
                await hub.join(token, site="shop")
            mine = hub.box()
            await hub.join(token, mine)
            with pytest.raises(Forbidden, match="used before"):
                await hub.join(token)  # from a photo
            # the same box again, its answer lost: the same key, the same token
            (mine / "identity" / "node.creds").unlink()
            assert (await hub.join(token, mine)).enrolled
            late = await hub.token("late", ttl=60)
            hub.shift = 61
            with pytest.raises(Forbidden, match="expired"):
                await hub.join(late)
            hub.shift = 0
            gone = await hub.token("gone")
            await hub.fleet.write(None, Key("JoinToken", CLUSTER, gone.name), 0, "ann")
            with pytest.raises(Forbidden, match="knows no such join token"):
                await hub.join(gone)
            for name in ("other", "late", "gone"):
                assert hub.fleet.store.find(Key("Node", CLUSTER, name)) is None
                assert hub.enrolment.member(name) is None

    run(body())


def test_of_two_boxes_with_one_token_exactly_one_wins(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            for n in range(4):
                token = await hub.token(f"race-{n}")
                boxes = [NodeIdentity.open(hub.box()) for _ in range(6)]
                got = await asyncio.gather(*(hub.enrol(token, b) for b in boxes), return_exceptions=True)
                won = [b for b, g in zip(boxes, got, strict=True) if not isinstance(g, BaseException)]
                assert len(won) == 1
                assert all(isinstance(g, Forbidden) for g in got if isinstance(g, BaseException)), got
                member = hub.enrolment.member(f"race-{n}")
                assert member is not None
                assert member.key == won[0].public_key

    run(body())


def test_two_hub_processes_decide_on_the_same(tmp_path: Path) -> None:
    """Two of them, each with its own view of the store, asked for the same token at the same moment."""

    async def body() -> None:
        from edgeward.core.audit import Audit
        from edgeward.core.resources import Resources
        from edgeward.core.store_nats import NatsStore
        from edgeward.core.vault import Vault
        from edgeward.nodes.enrol import EnrolAsk, Member, transcript
        from edgeward.nodes.enrol_cloud import Enrolment

        async with open_hub(tmp_path) as hub:
            store = NatsStore(hub.fleet.hub.client)
            await store.open()
            following = asyncio.create_task(store.run())
            resources = Resources(store, Audit())

            async def write(resource: Any, key: Key, expect: int, actor: str) -> None:
                await resources.create(resource, actor=actor)

            other = Enrolment(
                store, hub.identity, hub.enrolment._claims, write, Audit(), Vault.open(tmp_path / "identity"), urls=[]
            )
            for n in range(8):
                token = await hub.token(f"race-{n}")
                await until(lambda t=token: _found(store, t.name))  # type: ignore[misc]
                asks = []
                for door in (hub.enrolment, other):
                    device = KeyPair.create("user")
                    # a nonce of one process is good at the other
                    ask = EnrolAsk(
                        hub.enrolment.nonces.make(time.time()), token.name, token.key.public, token.node, token.site,
                        device.public, make_csr(token.node, new_key()),
                    )  # fmt: skip
                    said = transcript(ask)
                    ask.tokenSignature, ask.signature = token.key.sign(said), device.sign(said)
                    asks.append(door.enrol(ask, "here"))
                got = await asyncio.gather(*asks, return_exceptions=True)
                assert sum(not isinstance(g, BaseException) for g in got) == 1, got
            # a renewal that was read before a revocation does not undo it
            held = hub.enrolment.member("race-0")
            assert held is not None

            def slow(member: Member | None) -> Member:
                assert member is not None
                if member.revoked:
                    raise Forbidden("is revoked")
                return member.__class__(**{f: getattr(member, f) for f in member.__struct_fields__} | {"serial": "1"})

            revision = store.fact_revision("member.race-0")
            await hub.enrolment.revoke("race-0", "ann")
            with pytest.raises(Conflict):
                await other._keep("race-0", held, revision)
            with pytest.raises(Forbidden):
                await other._change("race-0", slow)
            following.cancel()

    async def _found(store: Any, name: str) -> bool:
        return store.find(Key("JoinToken", CLUSTER, name)) is not None

    run(body())


def csr_of(subject: x509.Name, key: Any = None) -> str:
    key = key or new_key()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    from cryptography.hazmat.primitives.serialization import Encoding

    return request.public_bytes(Encoding.PEM).decode()


def cn(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n) for n in names])


def test_a_request_for_anothers_name_is_denied(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token()
            box = NodeIdentity.open(hub.box())
            organisation = x509.Name(
                [x509.NameAttribute(NameOID.COMMON_NAME, "box"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hub")]
            )
            from cryptography.hazmat.primitives.asymmetric import rsa

            weak = rsa.generate_private_key(65537, 1024)  # noqa: S505
            for subject in (cn("plant-1"), cn("box", "plant-1"), cn(), cn("BOX"), cn("box "), organisation):
                with pytest.raises(Refused, match="its subject is"):
                    await hub.enrol(token, box, csr=csr_of(subject))
            with pytest.raises(Invalid, match="P-256"):
                await hub.enrol(token, box, csr=csr_of(cn("box"), weak))
            for junk in ("", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
                with pytest.raises(Invalid):
                    await hub.enrol(token, box, csr=junk)
            tampered = make_csr("box", new_key()).replace("A", "B", 1)
            with pytest.raises((Invalid, Refused)):
                await hub.enrol(token, box, csr=tampered)
            assert hub.enrolment.member("box") is None, "none of it took the name"
            assert (await hub.enrol(token, box)).site == "plant"
            # and at renewal
            await hub.join(await hub.token("b2"), data := hub.box())
            identity = NodeIdentity.open(data / "identity")
            with pytest.raises(Refused, match="its subject is"):
                await hub.renew(identity, "b2", csr=csr_of(cn("plant-1")))

    run(body())


def test_what_a_certificate_at_renewal_must_be(tmp_path: Path) -> None:
    """Forged, self-signed, another's, of another hub: refused. Expired: the device key is what counts."""

    async def body() -> None:
        async with open_hub(tmp_path / "a") as hub:
            identity = await hub.join(await hub.token())
            other = await hub.join(await hub.token("other"))
            foreign = HubIdentity.open(tmp_path / "foreign").authority
            now = hub.now()
            from edgeward.core.certs import check_csr, pem

            csr = check_csr(make_csr("box", key := new_key()), "box")
            forged = pem(foreign.node(csr, "box", now + DAY))
            builder = x509.CertificateBuilder().subject_name(cn("box")).issuer_name(hub.identity.authority.cert.subject)
            import datetime

            begin = datetime.datetime.now(datetime.UTC)
            self_signed = pem(
                builder.public_key(key.public_key()).serial_number(7).not_valid_before(begin)
                .not_valid_after(begin + datetime.timedelta(days=9)).sign(key, hashes.SHA256())
            )  # fmt: skip
            for bad in (forged, self_signed):
                with pytest.raises(Refused, match="not made by this hub"):
                    await hub.renew(identity, "box", certificate=bad)
            with pytest.raises(Refused, match="other"):
                await hub.renew(identity, "box", certificate=other.certificate)
            with pytest.raises(Invalid):
                await hub.renew(identity, "box", certificate="x")
            with pytest.raises(Forbidden, match="signature"):
                await hub.renew(identity, "box", signer=other)
            with pytest.raises(Forbidden, match="not its device key"):
                await hub.renew(other, "box", csr=make_csr("box", new_key()))
            with pytest.raises(NotFound):
                await hub.renew(identity, "nobody", csr=make_csr("nobody", new_key()))
            hub.shift = 400 * DAY
            assert await hub.renew(identity, "box") is False
            await hub.enrolment.revoke("box", "ann")
            with pytest.raises(Forbidden, match="is revoked"):
                await hub.renew(identity, "box")

    run(body())


def test_nonces_are_ours_fresh_and_used_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token()
            box = NodeIdentity.open(hub.box())
            old = hub.enrolment.nonces.make(hub.now() - 200)
            for bad in ("", "x", "A" * 56, old, hub.enrolment.nonces.make(hub.now() + 100)):
                with pytest.raises(Refused, match="nonce"):
                    await hub.enrol(token, box, nonce=bad)
            nonce = hub.enrolment.nonces.make(hub.now())
            await hub.enrol(token, box, nonce=nonce)
            with pytest.raises(Refused, match="was used"):
                await hub.enrol(token, box, nonce=nonce)

    run(body())


@pytest.mark.parametrize("ahead", [0, 2 * DAY], ids=["", "set back since"])
def test_a_revoked_node_is_cut_at_once_and_for_good(tmp_path: Path, ahead: float) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            hub.shift = ahead  # the hub's clock was wrong when it gave the credentials, and was set right then
            identity, other = await hub.join(await hub.token()), await hub.join(await hub.token("other"))
            async with hub.leaf(identity, "box") as leaf, hub.leaf(other, "other") as bystander:
                await until(leaf.linked)
                await until(bystander.linked)
                await hub.fleet.ask("box", "beat", BeatAsk(1, "run"), BeatAnswer)
                node = Key("Node", CLUSTER, "box")
                await until(lambda: _status(hub, node, online=True))
                pids = (hub.fleet.server.pid, bystander.server.pid)
                hub.shift = 0
                await hub.enrolment.revoke("box", "ann")
                status = hub.fleet.store.get(node).status
                assert (status["online"], status["revoked"]) == (False, True), "when the call returns it is so"
                await until(lambda: _not(leaf))
                await until(lambda: _said(leaf, "Revoked"))
                said = leaf.said().count("Authorization Violation")
                # it tries again and again, and is refused each time
                await until(lambda: _count(leaf, "Authorization Violation", said + 2))
                assert not await leaf.linked()
                answer = await hub.fleet.ask("box", "beat", BeatAsk(2, "run"), BeatAnswer)
                assert "is revoked" in answer.error, "what was on its way does not bring it back online"
                assert hub.fleet.store.get(node).status["online"] is False
                assert await bystander.linked()
                assert pids == (hub.fleet.server.pid, bystander.server.pid)
            with pytest.raises(NotFound):
                await hub.enrolment.revoke("nobody", "ann")

    async def _status(hub: OpenHub, key: Key, **wanted: Any) -> bool:
        status = hub.fleet.store.get(key).status
        return all(status.get(k) == v for k, v in wanted.items())

    async def _not(leaf: Any) -> bool:
        return not await leaf.linked()

    async def _said(leaf: Any, text: str) -> bool:
        return text in leaf.said()

    async def _count(leaf: Any, text: str, n: int) -> bool:
        return bool(leaf.said().count(text) >= n)

    run(body())


def test_credentials_that_nats_does_not_take(tmp_path: Path) -> None:
    """Forged by an account of one's own, expired, made for another's subjects: nats-server refuses the leaf."""

    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            identity = await hub.join(await hub.token())
            good = identity.jwt
            key = KeyPair.from_seed((identity.directory / "node.seed").read_text())
            nats = {k: v for k, v in claims_of(good)["nats"].items() if k != "version"}
            member = hub.enrolment.member("box")
            assert member is not None
            own = KeyPair.create("account")
            wide = {**nats, "pub": {}, "sub": {}}
            expired = hub.identity.user_jwt("box", member.seed, key.public, issued=1, expires=int(time.time()) - 5)
            for jwt in (mint(own, key.public, "box", wide), expired):
                identity.creds_file.write_text(creds_text(jwt, key))
                async with hub.leaf(identity, "box") as leaf:
                    await until(lambda leaf=leaf: _refused(leaf))  # type: ignore[misc]
                    assert not await leaf.linked()
            identity.creds_file.write_text(creds_text(good, key))
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)

    async def _refused(leaf: Any) -> bool:
        return "Authorization Violation" in leaf.said() or "uthentication" in leaf.said()

    run(body())


def test_400_days_away_and_back_without_a_visit(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            hub.shift = -400 * DAY
            identity = await hub.join(await hub.token())
            assert identity.lease[1] < time.time() - 309 * DAY
            hub.shift = 0
            async with hub.leaf(identity, "box") as leaf:
                await until(lambda: _refused(leaf))
                assert not await leaf.linked()
                await hub.renew(identity, "box")
                await until(leaf.linked), "the running server takes the new credentials"
            assert identity.lease[1] > time.time() + 89 * DAY

    async def _refused(leaf: Any) -> bool:
        return "Authorization Violation" in leaf.said()

    run(body())


def test_a_lost_box_is_replaced(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            lost = await hub.join(await hub.token())
            with pytest.raises(Refused, match="cannot be taken by another"):
                await hub.token()
            await hub.enrolment.revoke("box", "ann")
            with pytest.raises(Refused, match="node replace box"):
                await hub.token()
            token = await hub.token(replace=True)
            with pytest.raises(Forbidden, match="this device key was revoked"):
                await hub.enrol(token, lost)
            found = await hub.join(token)
            assert found.public_key != lost.public_key
            async with hub.leaf(found, "box") as leaf, hub.leaf(lost, "box") as thief:
                await until(leaf.linked)
                assert not await thief.linked()
            with pytest.raises(Forbidden, match="is revoked"):
                await hub.renew(lost, "box")
            assert hub.fleet.store.get(Key("Node", CLUSTER, "box")).status["revoked"] is False
            # the lost box turns up and may come back, with a new key in its old directory
            again = await hub.join(await hub.token(site="", replace=True), lost.directory.parent)
            assert again.public_key not in (lost.public_key, found.public_key)
            assert not lost.directory.with_name("identity.new").exists()

    run(body())


def test_a_deleted_node_is_cut_and_its_name_is_free(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token()
            identity = await hub.join(token)
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)
                await hub.fleet.write(None, Key("Node", CLUSTER, "box"), 0, "ann")
                await until(lambda: _not(leaf))
            with pytest.raises(Forbidden):
                await hub.join(token)
            with pytest.raises((Forbidden, NotFound)):
                await hub.renew(identity, "box")
            assert (await hub.join(await hub.token())).public_key != identity.public_key

    async def _not(leaf: Any) -> bool:
        return not await leaf.linked()

    run(body())


def test_a_start_brings_into_force_what_was_decided_before_a_kill(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            identity = await hub.join(await hub.token())
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)
                from edgeward.nodes import enrol as rules

                member = hub.enrolment.member("box")
                assert member is not None
                barred = hub.enrolment._with_account("box", rules.revoke(member, hub.now()), member)
                # durable, and killed before nats-server heard of it
                revision = hub.fleet.store.fact_revision("member.box")
                await hub.enrolment._keep("box", barred, revision)
                assert await leaf.linked()
                await hub.enrolment.open()
                await until(lambda: _not(leaf))

    async def _not(leaf: Any) -> bool:
        return not await leaf.linked()

    run(body())


def test_nodes_of_an_earlier_release_go_on_and_get_a_device_key(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            f = hub.fleet
            identity = NodeIdentity.open(hub.box() / "identity")
            identity.accept(f.identity.issue_node("plant-1", identity.public_key), f.identity.ca_pem)
            stranger = NodeIdentity.open(hub.box() / "identity")
            await hub.enrolment.open()  # the start of this release
            assert f.identity.take_files() == {}
            async with hub.leaf(identity, "plant-1") as leaf:
                await until(leaf.linked)
            with pytest.raises(Forbidden):
                await hub.renew(stranger, "plant-1", jwt="")
            with pytest.raises(Forbidden):
                await hub.renew(stranger, "plant-1", jwt=identity.jwt)
            account = KeyPair.create("account")
            forged = mint(account, stranger.public_key, "plant-1", {"type": "user"})
            with pytest.raises(Forbidden):
                await hub.renew(stranger, "plant-1", jwt=forged)
            await hub.renew(identity, "plant-1")
            member = hub.enrolment.member("plant-1")
            assert member is not None
            assert (member.key, member.legacy) == (identity.public_key, False)
            async with hub.leaf(identity, "plant-1") as leaf:
                await until(leaf.linked)

    run(body())


def test_what_is_open_takes_only_small_and_well_formed_asks(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            # by what it announces, before any of it is read
            assert (await asyncio.to_thread(post, hub, "/api/v1/enrol", b"", "", 64_000))[0] == 413
            for junk in (b"", b"{", b"[]", b"{}", b'{"nonce":1}', b'"x"', b"\xff"):
                assert (await asyncio.to_thread(post, hub, "/api/v1/enrol", junk))[0] == 422
            for path in ("/api/v1/issue/jointoken", "/api/v1/nodes/plant-1/revoke"):
                assert (await asyncio.to_thread(post, hub, path, b"{}"))[0] == 401
            status, doc = await asyncio.to_thread(post, hub, "/api/v1/issue/jointoken", b'{"node":"n1"}', "admin")
            assert (status, doc["field"]) == (422, "$.site")
            ask = b'{"node":"n1","site":"plant","ttl":"2d"}'
            status, doc = await asyncio.to_thread(post, hub, "/api/v1/issue/jointoken", ask, "admin")
            assert status == 201
            assert set(doc) == {"token", "name", "expires"}
            for bad in ('"60d"', '"x"', "0", "-1", '"0s"', "1e99"):
                data = b'{"node":"n2","site":"plant","ttl":%b}' % bad.encode()
                assert (await asyncio.to_thread(post, hub, "/api/v1/issue/jointoken", data, "admin"))[0] == 422
            data = b'{"node":"n2","site":"nowhere"}'
            status, doc = await asyncio.to_thread(post, hub, "/api/v1/issue/jointoken", data, "admin")
            assert (status, doc["field"]) == (422, "$.spec.site")

    run(body())


def test_a_flood_of_bad_asks_hinders_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token, box = await hub.token(), NodeIdentity.open(hub.box())
            wrong = token.__class__(1, token.name, token.node, token.site, token.urls, token.pin, bytes(32))
            got = await asyncio.gather(*(hub.enrol(wrong, box) for _ in range(60)), return_exceptions=True)
            kinds = {type(g) for g in got}
            assert kinds <= {Forbidden, TooMany}
            assert TooMany in kinds, "it is told to slow down"
            trail = [a for a in hub.audit.items() if a["verb"] == "enrol"]  # type: ignore[attr-defined]
            assert trail == [], "strangers cannot wash the trail away"
            assert (await hub.enrol(token, box)).site == "plant", "from the same address"

    run(body())


def test_only_the_hub_that_the_token_pins_is_believed(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path / "a") as hub, open_hub(tmp_path / "b") as other:
            token = await hub.token()
            with pytest.raises(Refused, match="certificate authority is not the one"):
                await hub.join(token, hub=other.url)
            nobody = NodeIdentity.open(hub.box())
            assert not nobody.enrolled
            with pytest.raises(Unreachable):
                await hub.join(token, hub="https://127.0.0.1:1")
            for bad in ("http://127.0.0.1:1", "https://", "https://h:x", "https://h/p"):
                with pytest.raises(Invalid):
                    await hub.join(token, hub=bad)
            await hub.join(token)

    run(body())


@pytest.mark.parametrize("killed_after", range(6))
def test_a_join_that_was_killed_is_done_again(
    tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes; with the same token in the same directory it ends well."""

    async def body() -> None:
        from edgeward.core import identity as module

        async with open_hub(tmp_path) as hub:
            token, data = await hub.token(), hub.box()
            writes = 0
            real = module.write_atomic

            def dying(*args: Any, **more: Any) -> None:
                nonlocal writes
                if writes == killed_after:
                    raise KeyboardInterrupt
                writes += 1
                real(*args, **more)

            monkeypatch.setattr(module, "write_atomic", dying)
            with pytest.raises(RuntimeError, match="killed"):
                await asyncio.to_thread(_join, data, token)
            monkeypatch.setattr(module, "write_atomic", real)
            identity = await hub.join(token, data)
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)

    def _join(data: Path, token: Any) -> None:
        try:
            enrol_edge.join(data, token)
        except KeyboardInterrupt:
            raise RuntimeError("killed") from None

    run(body())


def test_members_are_sealed_at_rest(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            await hub.join(await hub.token())
            member = hub.enrolment.member("box")
            assert member is not None
            raw = hub.fleet.store.fact("member.box")
            assert raw is not None
            assert member.seed.encode() not in raw

    run(body())
