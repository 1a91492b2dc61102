"""What the plane is told of the node's broker: as it is, else as it was last, so that a new agent disturbs nothing."""

from __future__ import annotations

from pathlib import Path

from edgeward.agent.broker import Broker
from edgeward.agent.replica import Replica
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import NatsServer
from edgeward.core.vault import Vault


def broker(folder: Path) -> Broker:
    vault = Vault.open(folder / "identity")
    replica = Replica(folder / "replica.db", site="s1", vault=vault)
    identity = NodeIdentity.open(folder / "identity")
    return Broker("n1", bind="0.0.0.0", hub={}, identity=identity, doors=list, replica=replica)  # noqa: S104


def test_the_plane_is_told_what_was_true_last_until_the_server_is_there(tmp_path: Path) -> None:
    first = broker(tmp_path)
    assert first.reach() is None
    first.server = NatsServer(tmp_path / "nats", first.spec())
    assert first.reach() is None  # not started: it has no ports
    first.server._ports = {"client": 4222, "mqtt": 1883}
    told = first.reach()
    assert told is not None
    assert (told["url"], told["mqtt_host"], told["mqtt_port"]) == ("nats://127.0.0.1:4222", "127.0.0.1", 1883)
    assert told["password"] == first.spec().plane_password != first.password()
    assert broker(tmp_path).reach() == told
