"""What a function must not be able to do, tried: in Python."""

import os
import signal
import socket
import time


def handler(event, context):
    what, _, rest = event.text().partition(" ")
    if what == "pid":
        return str(os.getpid())
    if what == "memory":
        held = []
        while True:
            held.append(bytearray(b"x") * (1 << 20))
    if what == "fork":
        made = 0
        try:
            while made < 10_000:
                if os.fork() == 0:
                    time.sleep(600)
                made += 1
        except OSError:
            pass
        return str(made)
    if what == "loop":
        while True:
            pass
    if what == "huge":
        return bytes(1 << 30)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return tried(what, rest)


def tried(what, rest):
    try:
        if what == "read":
            with open(rest, "rb") as file:  # noqa: PTH123
                return file.read(100) or "empty"
        if what == "write":
            with open(rest, "wb") as file:  # noqa: PTH123
                file.write(b"x")
        if what == "tcp":
            socket.create_connection(("127.0.0.1", int(rest)), 5).close()
        if what == "udp":
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(rest)))
        if what == "signal":
            os.kill(int(rest), signal.SIGKILL)
    except (OSError, UnicodeError) as e:
        return f"refused: {type(e).__name__}"
    return "done"
