"""How a program becomes a worker: it takes the place of the zygote's fork, or is started anew for each call.

:func:`run` is called in the cage. A program that speaks the worker protocol finds its socket by ``EDGEWARD_WORKER_FD``.
With ``mode: stdio`` this process goes on and speaks the protocol for it: an event's data is the program's standard
input, its attributes are in the environment (``CE_...``; an HTTP request as in CGI, RFC 3875), what it writes is the
answer, a status other than 0 is an error. What it writes to standard error goes to the log either way.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import Any

from edgeward.core import invocation as wire

#: The descriptor of a program's socket, and where it is told so.
WORKER_FD = 3
WORKER_ENV = "EDGEWARD_WORKER_FD"
_SDK = "edgeward-stdio/1"
_PIECE = 64 * 1024
#: Bytes of one header that a program is told; longer ones, and those beyond the number, are left out.
_HEADER, _HEADERS = 8192, 200
_DEFAULTS = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


def run(sock: socket.socket, argv: list[str], per_call: bool, may_fork: bool) -> None:
    """Serves calls until the socket closes; returns only with ``per_call``, or when the program cannot be started."""
    os.set_inheritable(sock.fileno(), False)
    for one in _DEFAULTS:
        signal.signal(one, signal.SIG_DFL)  # Python ignores some, and a program would go on to
    if per_call:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if may_fork:
            _PerCall(sock, argv).run()
        else:
            why = "mode stdio starts a process per call, and this node cannot bound how many: it takes cgroups (root)"
            sock.sendall(wire.frame(wire.Broken(why)))
        return
    if sock.fileno() == WORKER_FD:
        os.set_inheritable(WORKER_FD, True)
    else:
        os.dup2(sock.fileno(), WORKER_FD)
    try:
        os.execve(argv[0], argv, {**os.environ, WORKER_ENV: str(WORKER_FD)})  # noqa: S606 - it is what the cage is for
    except OSError as e:
        sock.sendall(wire.frame(wire.Broken(f"{argv[0]} cannot be started: {e.strerror}")))


def environment(function: str, version: str, invocation: str, left: float, event: wire.Event) -> dict[str, str]:
    """What a program is told of a call beside the data."""
    told = {
        "EDGEWARD_FUNCTION": function,
        "EDGEWARD_VERSION": version,
        "EDGEWARD_INVOCATION": invocation,
        "EDGEWARD_LEFT": f"{left:.3f}",
        "CE_SPECVERSION": "1.0",
        "CE_ID": event.id,
        "CE_SOURCE": event.source,
        "CE_TYPE": event.type,
        "CONTENT_LENGTH": str(len(event.data)),
    }
    optional = {"SUBJECT": event.subject, "TIME": event.time, "DATACONTENTTYPE": event.datacontenttype}
    told |= {f"CE_{k}": v for k, v in optional.items() if v}
    told |= {f"CE_{k.upper()}": v for k, v in event.extensions.items()}
    if event.datacontenttype:
        told["CONTENT_TYPE"] = event.datacontenttype
    if event.http is not None:
        http = event.http
        told |= {"REQUEST_METHOD": http.method, "PATH_INFO": http.path, "QUERY_STRING": http.query}
        told |= {"REMOTE_ADDR": http.client, "GATEWAY_INTERFACE": "CGI/1.1"}
        for key, value in http.headers[:_HEADERS]:
            if len(value) > _HEADER or key == "proxy":  # HTTP_PROXY means something else to many programs
                continue
            name = "HTTP_" + key.upper().replace("-", "_")
            told[name] = f"{told[name]}, {value}" if name in told else value
    return {k: v.replace("\0", "") for k, v in told.items() if "\0" not in k and "=" not in k}


def _left_behind() -> bool:
    """Whether a process is still there that a call started: those that lost their parent are ours."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if not pid:
            return True


class _PerCall:
    """Speaks the protocol for a program that is started for each call."""

    def __init__(self, sock: socket.socket, argv: list[str]) -> None:
        self._sock, self._argv = sock, argv
        self._frames = wire.Frames()
        self._waiting: list[bytes] = []
        self._base = dict(os.environ)

    def _send(self, message: Any) -> None:
        self._sock.sendall(wire.frame(message))

    def _receive(self) -> wire.ToWorker | None:
        while not self._waiting:
            data = self._sock.recv(256 * 1024)
            if not data:
                return None
            self._waiting = list(self._frames.feed(data))
        message: wire.ToWorker = wire.decode_to_worker(self._waiting.pop(0))
        return message

    def run(self) -> None:
        init = self._receive()
        if not isinstance(init, wire.Init):
            return
        self._send(wire.Ready(1, _SDK))
        while (call := self._receive()) is not None:
            if isinstance(call, wire.Invoke):
                answer = self._answer(init, call)
                if _left_behind():  # it ends with this instance, and no other call has to do with it
                    self._send(wire.Leaving(call.id))
                self._send(answer)

    def _answer(self, init: wire.Init, call: wire.Invoke) -> wire.Result | wire.Raised:
        env = self._base | environment(f"{init.namespace}/{init.name}", init.version, call.id, call.left, call.event)
        try:
            status, body = self._once(env, call.event.data, init.max_body)
        except OSError as e:
            return wire.Raised(call.id, "error", "OSError", f"{self._argv[0]} cannot be started: {e.strerror}")
        if len(body) > init.max_body:
            message = f"the answer has more than {init.max_body} bytes; at most these are allowed"
            return wire.Raised(call.id, "too-large", message)
        if status:
            name = f"Signal({-status})" if status < 0 else f"ExitStatus({status})"
            return wire.Raised(call.id, "error", name)
        try:
            body.decode()
            kind = "text/plain; charset=utf-8"
        except UnicodeDecodeError:
            kind = "application/octet-stream"
        return wire.Result(call.id, body, 200, [("content-type", kind)] if body else [])

    def _once(self, env: dict[str, str], data: bytes, bound: int) -> tuple[int, bytes]:
        """(exit status or minus the signal, what it wrote): one process, with its input and its output."""
        (read_in, write_in), (read_out, write_out) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        held = {read_in, write_in, read_out, write_out}

        def close(fd: int) -> None:
            held.discard(fd)
            os.close(fd)

        try:
            actions = [(os.POSIX_SPAWN_DUP2, read_in, 0), (os.POSIX_SPAWN_DUP2, write_out, 1)]
            pid = os.posix_spawn(self._argv[0], self._argv, env, file_actions=actions, setsigdef=_DEFAULTS)
            close(read_in)
            close(write_out)
            try:
                body = self._exchange(pid, write_in, read_out, data, bound, close)
            finally:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is ours; most often it has ended
                _, status = os.waitpid(pid, 0)
            if len(body) > bound:
                return 0, body
            if (ended := os.waitstatus_to_exitcode(status)) == -signal.SIGKILL:
                # by the kernel, for its memory? The node knows, and asks when this process ends likewise
                os.kill(os.getpid(), signal.SIGKILL)
            return ended, body
        finally:
            for fd in held:
                os.close(fd)

    def _exchange(self, pid: int, write: int, read: int, data: bytes, bound: int, close: Any) -> bytes:
        """Until the program has ended (what it started may hold its output open), or wrote more than ``bound``."""
        os.set_blocking(write, False)
        os.set_blocking(read, False)
        body, rest = bytearray(), memoryview(data)
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(read, select.POLLIN)
        if rest:
            poll.register(write, select.POLLOUT)
        else:
            close(write)
        try:
            while len(body) <= bound:
                ready = {fd for fd, _ in poll.poll()}
                if write in ready:
                    try:
                        rest = rest[os.write(write, rest[:_PIECE]) :]
                    except BrokenPipeError:  # it does not want to know
                        rest = rest[:0]
                    if not rest:
                        poll.unregister(write)
                        close(write)
                if read in ready:
                    piece = os.read(read, _PIECE)
                    body += piece
                    if not piece:
                        poll.unregister(read)
                    continue
                if ended in ready:
                    break
            return bytes(body)
        finally:
            os.close(ended)
