"""A function with a list reaches what is on it, by TCP and UDP, and nothing else, however it tries."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.functions import seccomp

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not seccomp.CALLS or not hasattr(os, "pidfd_open"),
    reason="seccomp's user notification is Linux's, on x86-64 and arm64",
)


class Servers:
    """Two ports that answer by TCP, and two by UDP; what came is in ``seen``."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tcp: list[int] = []
        self.udp: list[int] = []


class Echo(asyncio.DatagramProtocol):
    def __init__(self, servers: Servers) -> None:
        self.servers = servers

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.servers.seen.append(f"udp {self.transport.get_extra_info('sockname')[1]} {data.decode()}")
        self.transport.sendto(b"udp " + data, addr)


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    made = Servers()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        data = await reader.read()
        made.seen.append(f"tcp {port} {data[:20].decode()}")
        writer.write(b"tcp " + data)
        writer.close()

    loop = asyncio.get_running_loop()
    opened = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(2)]
    made.tcp = [s.sockets[0].getsockname()[1] for s in opened]
    ends = [await loop.create_datagram_endpoint(lambda: Echo(made), ("127.0.0.1", 0)) for _ in range(2)]
    made.udp = [t.get_extra_info("sockname")[1] for t, _ in ends]
    try:
        yield made
    finally:
        for server in opened:
            server.close()
        for transport, _ in ends:
            transport.close()


# What a handler tries is the event's text: it runs there, with `a` and `b` as the ports of the list and the other's.
CODE = """
import asyncio, errno, os, socket, struct, threading, ctypes

def tcp(host, port, family=socket.AF_INET, blocking=True):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(None if blocking else 10)
    s.connect((host, port))
    s.sendall(b"hi")
    s.shutdown(socket.SHUT_WR)
    return s.recv(100).decode()

def udp(host, port, connect=False):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(10)
    if connect:
        s.connect((host, port))
        s.send(b"hi")
    else:
        s.sendto(b"hi", (host, port))
    return s.recvfrom(100)[0].decode()

def handler(event, context):
    scope = dict(globals())
    try:
        exec("def tried():\\n" + "".join("    " + line + "\\n" for line in event.text().splitlines()), scope)
        return str(scope["tried"]())
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e.errno)) if not isinstance(e, socket.gaierror) else f"gaierror {e}"
"""


def reaching(*entries: str, **limits: Any) -> Any:
    return function("f", CODE, limits={"network": list(entries), "timeout": "20s", **limits})


async def tries(node: Node, code: str) -> str:
    return (await node.call("f", code.encode())).body.decode()


@looped
async def test_what_is_listed_is_reached_and_nothing_else(tmp_path: Path) -> None:
    async with servers() as s, Node(tmp_path) as node:
        a, b, ua, ub = *s.tcp, *s.udp
        node.d.configure([reaching(f"127.0.0.1:{a}", f"127.0.0.0/30:{ua}/udp", "[::1]:9")])
        await node.phase("f", "Running")
        assert "network" in node.status("f")["enforced"]
        assert await tries(node, f"return tcp('127.0.0.1', {a})") == "tcp hi"
        assert await tries(node, f"return tcp('127.0.0.1', {a}, blocking=False)") == "tcp hi"
        assert await tries(node, f"return tcp('::ffff:127.0.0.1', {a}, socket.AF_INET6)") == "tcp hi"
        assert await tries(node, f"return udp('127.0.0.1', {ua})") == "udp hi"
        assert await tries(node, f"return udp('127.0.0.1', {ua}, connect=True)") == "udp hi"
        got = len(s.seen)
        for attempt in (
            f"return tcp('127.0.0.1', {b})",
            f"return tcp('127.0.0.1', {b}, blocking=False)",
            f"return tcp('::ffff:127.0.0.1', {b}, socket.AF_INET6)",
            f"return tcp('127.0.0.1', {ua})",  # the port is UDP's
            f"return udp('127.0.0.1', {ub})",
            f"return udp('127.0.0.1', {a})",
            f"return udp('127.0.0.1', {ub}, connect=True)",
            f"return socket.socket(2, socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, ('127.0.0.1', {ub}))",
            f"s = socket.socket(); return s.sendto(b'x', socket.MSG_FASTOPEN, ('127.0.0.1', {b}))",
            f"s = socket.socket(); return s.sendmsg([b'x'], [], socket.MSG_FASTOPEN, ('127.0.0.1', {b}))",
            f"s = socket.socket(2, socket.SOCK_DGRAM); s.bind(('127.0.0.1', {b})); return s.getsockname()",
            "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); return 'listens'",
            "s = socket.socket(); s.listen(); return 'listens'",
            "return socket.socket(socket.AF_UNIX)",
            "return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
            "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
            "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        ):
            assert await tries(node, attempt) in ("EACCES", "EPERM", "ENOTSUP"), attempt
        assert len(s.seen) == got, "something went out"
        log = [line.message for line in node.log("f").lines(lambda _: True, 100)]
        assert f"127.0.0.1:{b} is not in limits.network: refused" in log
        # what a refusal costs is one call: it goes on
        assert await tries(node, f"return tcp('127.0.0.1', {a})") == "tcp hi"


@looped
async def test_a_connected_socket_is_as_fast_and_as_wide_as_ever(tmp_path: Path) -> None:
    async with servers() as s, Node(tmp_path) as node:
        node.d.configure([reaching(f"127.0.0.1:{s.tcp[0]}")])
        code = f"""
s = socket.create_connection(("127.0.0.1", {s.tcp[0]}))
sent = s.sendmsg([b"a" * 10, b"b" * 10])
s.sendall(b"c" * 1000)
s.shutdown(socket.SHUT_WR)
data = b""
while piece := s.recv(65536):
    data += piece
return sent, data[:24], len(data) > 24
"""
        assert await tries(node, code) == str((20, b"tcp " + b"a" * 10 + b"b" * 10, True))
        code = f"""
async def main():
    r, w = await asyncio.open_connection("127.0.0.1", {s.tcp[0]})
    w.write(b"by asyncio"); w.write_eof()
    return await r.read()
return asyncio.run(main())
"""
        assert await tries(node, code) == str(b"tcp by asyncio")


@looped
async def test_a_name_is_looked_up_by_the_node_when_it_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers() as s, Node(tmp_path) as node:
        a = s.tcp[0]
        asked: list[str] = []

        async def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
            asked.append(host)
            if host == "gone.example.org":
                raise socket.gaierror(socket.EAI_NONAME, "no")
            addresses = {"api.example.org": ["127.0.0.1"], "rebound.example.org": ["127.0.0.1", "169.254.1.1"]}[host]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (x, 0)) for x in addresses]

        monkeypatch.setattr("edgeward.functions.guard.plausible", lambda x: "rebound.example.org" not in asked)
        monkeypatch.setattr("edgeward.functions.guard.look_up", lambda _loop, name: getaddrinfo(name))
        names = [f"{n}.example.org:{a}" for n in ("api", "gone", "rebound")]
        node.d.configure([reaching(*names)])
        assert await tries(node, f"return tcp(*socket.getaddrinfo('API.example.org.', {a})[0][4])") == "tcp hi"
        code = f"return socket.create_connection(('api.example.org', {a})).getpeername()"
        assert await tries(node, code) == str(("127.0.0.1", a))
        assert asked == ["api.example.org"]  # remembered
        assert (await tries(node, f"return socket.create_connection(('other.example.org', {a}))")).startswith(
            "gaierror"
        )
        assert await tries(node, f"return socket.create_connection(('gone.example.org', {a}))") == "EHOSTUNREACH"
        assert await tries(node, f"return tcp(socket.gethostbyname('api.example.org'), {s.tcp[1]})") == "EACCES"
        got = len(s.seen)
        # a name that suddenly means the node itself is nowhere to go
        assert await tries(node, f"return socket.create_connection(('rebound.example.org', {a}))") == "ENETUNREACH"
        assert len(s.seen) == got


@looped
async def test_what_was_checked_is_what_is_done(tmp_path: Path) -> None:
    """Another thread writes the other port into the address all the time; the wrong one is never reached."""
    async with servers() as s, Node(tmp_path) as node:
        a, b = s.tcp
        node.d.configure([reaching(f"127.0.0.1:{a}", pids=32)])
        code = f"""
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.create_string_buffer(struct.pack("=H", 2) + struct.pack("!H", {a}) + b"\\x7f\\0\\0\\1" + bytes(8), 16)
ports, stop = [struct.pack("!H", {a}), struct.pack("!H", {b})], []
def flip():
    n = 0
    while not stop:
        n += 1
        ctypes.memmove(ctypes.addressof(address) + 2, ports[n % 2], 2)
thread = threading.Thread(target=flip)
thread.start()
done = refused = other = 0
while done + refused + other < 300 or (not (done and refused) and done + refused < 5000):
    s = socket.socket()
    if libc.connect(s.fileno(), address, 16) == 0:
        done += 1
        assert s.getpeername()[1] == {a}
    elif ctypes.get_errno() == errno.EACCES:
        refused += 1
    else:
        other += 1
    s.close()
stop.append(1)
thread.join()
return other
"""
        assert await tries(node, code) == "0"
        assert not [line for line in s.seen if line.startswith(f"tcp {b}")]


@looped
async def test_children_and_a_dying_worker_are_held_too(tmp_path: Path) -> None:
    async with servers() as s, Node(tmp_path) as node:
        a, b = s.tcp
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        waiting = [socket.socket() for _ in range(8)]  # more than wait there: the next one is not answered
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        never = full.getsockname()[1]
        node.d.configure([reaching(f"127.0.0.1:{a}", f"127.0.0.1:{never}", timeout="2s")])
        code = f"""
r, w = os.pipe()
if os.fork() == 0:
    out = []
    for port in ({a}, {b}):
        try:
            out.append(tcp("127.0.0.1", port))
        except OSError as e:
            out.append(errno.errorcode[e.errno])
    os.write(w, repr(out).encode())
    os._exit(0)
os.close(w)
said = os.read(r, 200).decode()
os.wait()
return said
"""
        await node.phase("f", "Running")
        if "pids" in node.status("f")["enforced"]:
            assert await tries(node, code) == str(["tcp hi", "EACCES"])
        # the descriptor by which the node is asked is not the function's
        code = "return [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')]"
        assert "seccomp" not in await tries(node, code)
        # one that waits for a connection that never comes is ended in time, and the next call is answered
        error = await node.fails("f", f"return tcp('127.0.0.1', {never})".encode())
        assert error.kind == "timeout"
        for client in (*waiting, full):
            client.close()
        assert await tries(node, f"return tcp('127.0.0.1', {a})") == "tcp hi"


NODE = """
import net from 'node:net';
import dgram from 'node:dgram';

function tcp(host, port) {
  return new Promise((resolve) => {
    const s = net.connect(port, host, () => s.end('hi'));
    let text = '';
    s.on('data', (d) => { text += d; });
    s.on('end', () => resolve(text));
    s.on('error', (e) => resolve(e.code));
  });
}

function udp(host, port) {
  return new Promise((resolve) => {
    const s = dgram.createSocket('udp4');
    s.on('error', (e) => resolve(e.code));
    s.send('hi', port, host, (e) => { if (e) resolve(e.code); else resolve('sent'); });
  });
}

export async function handler(event) {
  const [how, host, port] = event.data.toString().split(' ');
  return await { tcp, udp }[how](host, Number(port));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
@looped
async def test_a_program_is_held_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def api(_loop: object, name: str) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    async with servers() as s, Node(tmp_path) as node:
        a, b, ua, ub = *s.tcp, *s.udp
        monkeypatch.setattr("edgeward.functions.guard.plausible", lambda _: True)
        monkeypatch.setattr("edgeward.functions.guard.look_up", api)
        reach = [f"127.0.0.1:{a}", f"api.example.org:{a}", f"127.0.0.1:{ua}/udp"]
        limits = {"network": reach, "timeout": "20s", "memory": "256Mi", "startup": "60s"}
        node.d.configure([function("f", NODE, runtime="node", limits=limits)])
        await node.phase("f", "Running")
        assert "network" in node.status("f")["enforced"]
        for asked, answer in (
            (f"tcp 127.0.0.1 {a}", "tcp hi"),
            (f"tcp api.example.org {a}", "tcp hi"),
            (f"tcp 127.0.0.1 {b}", "EACCES"),
            (f"tcp api.example.org {b}", "EACCES"),
            (f"tcp other.example.org {a}", "ENOTFOUND"),
            (f"udp 127.0.0.1 {ua}", "sent"),
            (f"udp 127.0.0.1 {ub}", "EACCES"),
        ):
            assert await tries(node, asked) == answer, asked
        assert not [line for line in s.seen if f" {b} " in line or f" {ub} " in line]


@pytest.mark.parametrize("runtime", ["node", "command"])
def test_a_list_holds_for_programs_too(tmp_path: Path, runtime: str) -> None:
    program = {"node": "node", "command": "perl"}[runtime]
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program} on this machine (scripts/system-packages.sh)")
    _programs(tmp_path, runtime)


@looped
async def _programs(tmp_path: Path, runtime: str) -> None:
    script = """
import net from 'node:net';
export const handler = (event) => new Promise((resolve) => {
  const s = net.connect(Number(event.text()), '127.0.0.1', () => s.end('hi'));
  s.on('data', (data) => resolve(String(data)));
  s.on('error', (error) => resolve(error.code));
});
"""
    perl = r"""#!/usr/bin/perl
socket(my $s, 2, 1, 0) or do { print $!{EACCES} ? 'EACCES' : $!; exit };
connect($s, pack('S n a4 x8', 2, <STDIN>, "\x7f\0\0\1")) or do { print $!{EACCES} ? 'EACCES' : $!; exit };
syswrite($s, 'hi');
shutdown($s, 1);
print <$s>;
"""
    async with servers() as s, Node(tmp_path) as node:
        mode = {"mode": "stdio"} if runtime == "command" else {}
        limits = {"network": [f"127.0.0.1:{s.tcp[0]}"], "timeout": "60s"}
        code = script if runtime == "node" else perl
        node.d.configure([function("f", code, runtime=runtime, limits=limits, **mode)])
        await until(lambda: node.status("f").get("phase") in ("Running", "Failed"), 60)
        if "stdio" in node.status("f").get("message", ""):
            pytest.skip("no groups here, so there is no mode stdio")
        assert "network" in node.status("f")["enforced"]
        assert await tries(node, str(s.tcp[0])) == "tcp hi"
        assert await tries(node, str(s.tcp[1])) == "EACCES"
        assert s.seen == [f"tcp {s.tcp[0]} hi"]
