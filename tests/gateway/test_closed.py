"""What is closed, to whom, and why something is not; what the kernel makes of it, in namespaces of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgeward.gateway import closed, nft
from edgeward.gateway.closed import Closed, Site, Wall, build, script

PLANT = Site(prefixes=("10.1.0.0/24", "fd00:1::/64"), nodes=("10.1.0.2", "10.1.0.3", "10.9.0.1"))
WEB = Closed("Service/web", "site", (8080,), (("10.2.0.2", 8080), ("fd00:2::2", 8080)))


def texts(wall: Wall) -> list[str]:
    return [str(n) for n in wall.inside]


def test_ports_are_open_to_the_site_and_other_sites_are_not_dialled() -> None:
    wall, why = build([WEB, Closed("Service/db", "node", (5432, 8080))], PLANT, "10.1.0.2")
    assert why == {}
    assert wall.site == (8080,)
    assert wall.node == (5432,), "what one Service opens to the site is open to it"
    assert texts(wall) == ["10.1.0.0/24", "10.9.0.1/32", "fd00:1::/64"]
    assert [(str(a), p) for a, p in wall.away] == [("10.2.0.2", 8080), ("fd00:2::2", 8080)]


def test_without_prefixes_the_networks_that_the_node_is_in_are_the_sites() -> None:
    site = Site(links=("192.168.1.0/24",), nodes=("192.168.1.5", "plant-2.example"))
    wall, why = build([Closed("Service/web", "site", (80,), (("10.0.0.9", 80),))], site, "192.168.1.5")
    assert (texts(wall), why) == (["192.168.1.0/24"], {})
    assert [(str(a), p) for a, p in wall.away] == [("10.0.0.9", 80)]


def test_the_same_private_address_behind_another_router_is_this_sites_own() -> None:
    """A dial of the site's own machine is never refused; that it cannot be told apart is said."""
    there = Closed("Service/web", "site", (), (("192.168.1.9", 80),))
    wall, why = build([there], Site(links=("192.168.1.0/24",)), "192.168.1.5")
    assert not wall
    assert "192.168.1.9 of another site is in this site's network as well" in why["Service/web"]
    assert build([there], Site(prefixes=("192.168.1.0/24",)), "192.168.1.5") == (
        Wall(inside=closed.inside(Site(prefixes=("192.168.1.0/24",)))),
        {},
    ), "declared: then it is"
    one_lan = Site(prefixes=("192.168.1.0/29",), nodes=("192.168.1.5",))
    wall, why = build([there], one_lan, "192.168.1.5")
    assert ([str(a) for a, _ in wall.away], why) == (["192.168.1.9"], {}), "two sites in one network, told apart"


def test_what_another_service_opens_is_not_called_closed() -> None:
    anybody = Closed("Service/all", "any", (8080,), (("10.2.0.2", 8080),))
    wall, why = build([WEB, anybody], PLANT, "10.1.0.2")
    assert wall.site == ()
    assert why == {"Service/web": "Service/all opens the same port (8080) to any site"}
    assert [(str(a), p) for a, p in wall.away] == [("fd00:2::2", 8080)]


def test_nodes_at_a_loopback_address_are_not_told_apart() -> None:
    wall, why = build([WEB, Closed("Service/all", "any", (1,))], PLANT, "127.0.0.1")
    assert not wall
    assert list(why) == ["Service/web"]
    assert "other sites on this machine" in why["Service/web"]


@pytest.mark.parametrize("text", ["fe80::1%x } drop", "10.2.0.2 }", "fd00::9%eth0", "", "any host"])
def test_what_a_node_says_of_its_address_becomes_no_rule(text: str) -> None:
    wall, _ = build(
        [Closed("Service/web", "site", (80,), ((text, 80),))], Site((), (text,), (text, "10.1.0.2")), "10.1.0.2"
    )
    assert wall == Wall((80,), (), (ipaddress.ip_network("10.1.0.2/32"),), ())
    assert "drop }" not in script("t", wall)


def test_places_elsewhere_have_an_end() -> None:
    many = tuple((f"10.{a}.{b}.{c}", 80) for a in range(2, 4) for b in range(100) for c in range(100))
    wall, _ = build([Closed("Service/web", "site", (), many)], PLANT, "10.1.0.2")
    assert len(wall.away) == 16384


def test_the_tables_name_is_the_nodes_alone() -> None:
    assert closed.table_name("plant-1", "0a1b2c3d") == "edgeward_plant_1_0a1b2c3d"
    assert script("t", Wall()) == closed.removal("t")


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t0900000A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
wg0\t0000080A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t0000140A\t0101A8C0\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0
"""
ROUTES6 = """fd000001000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth0
fd000002000000000000000000000000 40 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth0
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth0
"""  # noqa: E501


def test_the_networks_that_are_reached_by_no_router_and_no_tunnel() -> None:
    assert closed.links4(ROUTES, ["eth0"]) == ("192.168.1.0/24",)
    assert closed.links4(ROUTES, ["eth0", "wg0"]) == ("10.8.0.0/16", "192.168.1.0/24")
    assert closed.links6(ROUTES6, ["eth0"]) == ("fd00:1::/64",)
    assert nft.links() is not None


# -- the kernel --------------------------------------------------------------------------------------------------------

_SERVER = (
    "import os, socket, sys, threading\n"
    "s = socket.create_server(('::', int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)\n"
    "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('0.0.0.0', int(sys.argv[1])))\n"
    "def echo():\n"
    "    while True:\n"
    "        d, a = u.recvfrom(100); u.sendto(d, a)\n"
    "threading.Thread(target=echo, daemon=True).start()\n"
    "print('up', flush=True)\n"
    "while True:\n"
    "    c, _ = s.accept(); c.sendall(b'here'); c.close()\n"
)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=60)


class World:
    """A router between a node and, each in a network of its own, a neighbour of its site and a stranger."""

    def __init__(self) -> None:
        self.spaces = {n: f"ewclosed-{os.getpid()}-{n}" for n in ("router", "node", "near", "far")}
        self.servers: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        for space in self.spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        router = self.spaces["router"]
        forward = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding"
        subprocess.run(["ip", "netns", "exec", router, "sh", "-ec", forward], check=True, timeout=60)
        for number, name in enumerate(("node", "near", "far"), 1):
            space = self.spaces[name]
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", router)
            for where, link, last in ((space, "eth0", 2), (router, name, 1)):
                _ip("-n", where, "addr", "add", f"10.{number}.0.{last}/24", "dev", link)
                _ip("-n", where, "addr", "add", f"fd00:{number}::{last}/64", "dev", link, "nodad")
                _ip("-n", where, "link", "set", link, "up")
            _ip("-n", space, "route", "add", "default", "via", f"10.{number}.0.1")
            _ip("-n", space, "-6", "route", "add", "default", "via", f"fd00:{number}::1")

    def inside(self, name: str, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.spaces[name]}", "--", *argv]

    def serve(self, name: str, port: int) -> None:
        server = subprocess.Popen(
            self.inside(name, sys.executable, "-c", _SERVER, str(port)), stdout=subprocess.PIPE, text=True
        )
        self.servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"

    def dial(self, name: str, host: str, port: int, wait: float = 30.0) -> str:
        """``here``, or the name of the error."""
        code = (
            "import socket, sys\n"
            "try:\n"
            "    c = socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))\n"
            "    print(c.recv(9).decode())\n"
            "except OSError as e: print(type(e).__name__)\n"
        )
        argv = self.inside(name, sys.executable, "-c", code, host, str(port), str(wait))
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout.strip()

    def udp(self, name: str, host: str, port: int, wait: float = 30.0) -> bool:
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(float(sys.argv[3]))\n"
            "s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'x'); s.recv(9)\n"
        )
        argv = self.inside(name, sys.executable, "-c", code, host, str(port), str(wait))
        return subprocess.run(argv, capture_output=True, timeout=120, check=False).returncode == 0

    def nft(self, *args: str, stdin: str = "") -> str:
        argv = self.inside("node", nft.program() or "nft", *args)
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=True).stdout

    def close(self) -> None:
        for server in self.servers:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()
        for space in self.spaces.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)


@pytest.fixture
def world() -> Iterator[World]:
    if why := nft.unusable():
        pytest.skip(f"nothing is enforced here: {why}")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    made = World()
    try:
        try:
            made.make()
        except (subprocess.CalledProcessError, OSError) as e:
            pytest.skip(f"no network namespaces here: {e}")
        yield made
    finally:
        made.close()


#: A dial that is dropped is one that is not answered; how long is waited decides nothing but the test's time.
DROPPED = 1.0


@pytest.mark.root
def test_the_kernel_keeps_strangers_out_and_refuses_dials_of_other_sites(world: World) -> None:
    for name, port in (("node", 8080), ("node", 9090), ("node", 7070), ("far", 8080), ("far", 8081)):
        if name == "node" or port == 8080:
            world.serve(name, port)
    world.serve("far", 8081)
    world.nft("-f", "-", stdin="table inet theirs {\n chain c {\n type filter hook input priority 0;\n}\n}\n")
    wall, why = build(
        [
            Closed("Service/web", "site", (8080,), (("10.3.0.2", 8080), ("fd00:3::2", 8080))),
            Closed("Service/db", "node", (9090,)),
        ],
        Site(prefixes=("10.1.0.0/24", "fd00:1::/64"), nodes=("10.1.0.2", "10.2.0.2")),
        "10.1.0.2",
    )
    assert why == {}
    assert world.dial("far", "10.1.0.2", 8080) == "here", "nothing is closed yet"
    world.nft("-f", "-", stdin=script("ours", wall))

    assert world.dial("far", "10.1.0.2", 8080, DROPPED) == "TimeoutError"
    assert world.dial("far", "fd00:1::2", 8080, DROPPED) == "TimeoutError"
    assert not world.udp("far", "10.1.0.2", 8080, DROPPED)
    assert world.dial("near", "10.1.0.2", 8080) == "here", "a node of the site, in another network"
    assert world.udp("near", "10.1.0.2", 8080)
    assert world.dial("near", "10.1.0.2", 9090, DROPPED) == "TimeoutError", "this machine's alone"
    assert world.dial("node", "10.1.0.2", 9090) == "here"
    assert world.dial("node", "127.0.0.1", 9090) == "here"
    assert world.dial("far", "10.1.0.2", 7070) == "here", "another port is nobody's business"
    for host in ("10.3.0.2", "fd00:3::2"):
        assert world.dial("node", host, 8080) == "ConnectionRefusedError", "at once, and no packet leaves"
        assert world.dial("node", host, 8081) == "here"
    assert not world.udp("node", "10.3.0.2", 8080)
    assert world.dial("near", "10.3.0.2", 8080) == "here", "other machines dial whom they like"

    counted = world.nft("list", "counters", "table", "inet", "ours")
    assert "refused_in" in counted
    assert "packets 0" not in counted
    # replaced whole: one port less, and what is counted goes on
    world.nft("-f", "-", stdin=script("ours", wall._replace(site=(), away=()), {"refused_in": (77, 7700)}))
    assert world.dial("far", "10.1.0.2", 8080) == "here"
    assert "packets 77 bytes 7700" in world.nft("list", "counters", "table", "inet", "ours")
    # a set of rules that cannot be taken changes nothing
    with pytest.raises(subprocess.CalledProcessError):
        world.nft("-f", "-", stdin=script("ours", wall).replace("@inside4", "@nowhere"))
    assert "packets 77 bytes 7700" in world.nft("list", "counters", "table", "inet", "ours")
    world.nft("-f", "-", stdin=script("ours", Wall()))
    assert world.nft("list", "tables") == "table inet theirs\n", "and nobody else's was touched"


_SHELL = """
import asyncio, ipaddress, sys
from edgeward.core.errors import Refused
from edgeward.gateway.closed import Wall
from edgeward.gateway.nft import Nft, links
async def main():
    nft, other = Nft("edgeward_a_1"), Nft("edgeward_b_1")
    net = ipaddress.ip_network("10.1.0.0/24")
    assert await nft.counted() is None
    await nft.remove()
    await other.apply(Wall(site=(1,)))
    await nft.apply(Wall(site=(8080,), inside=(net,), away=((ipaddress.ip_address("10.3.0.2"), 80),)))
    assert await nft.counted() == {"refused_in": (0, 0), "refused_out": (0, 0)}
    try:
        await asyncio.open_connection("10.3.0.2", 80)
    except ConnectionRefusedError:
        pass
    first = await nft.counted()
    assert first["refused_out"][0] > 0, first
    await nft.apply(Wall(site=(8080, 9090), inside=(net,)))
    assert await nft.counted() == first, "they go on"
    try:
        await nft._run("-f", "-", stdin="table inet edgeward_a_1 { nonsense }")
    except Refused as e:
        assert "nonsense" in str(e)
    else:
        raise AssertionError
    await nft.apply(Wall())
    assert await nft.counted() is None
    assert await other.counted() is not None
    assert links() == ("10.1.0.0/24", "fd00:1::/64", "fe80::/64"), links()
asyncio.run(main())
"""


@pytest.mark.root
def test_the_shell_applies_counts_and_removes_what_is_its_own(world: World) -> None:
    argv = world.inside("node", sys.executable, "-c", _SHELL)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_who_may_not_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "_may", lambda: True)
    monkeypatch.setattr(nft, "program", lambda: None)
    assert "not installed" in nft.unusable()
    monkeypatch.setattr(nft, "_may", lambda: False)
    assert nft.unusable() == "needs root (CAP_NET_ADMIN)"


def test_a_program_that_is_not_there_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "program", lambda: "/nonexistent/nft")
    with pytest.raises(nft.Refused, match="nft cannot be run"):
        asyncio.run(nft.Nft("t").remove())
    assert socket.if_nameindex()
