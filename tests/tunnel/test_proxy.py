"""Who may go on looking at a page behind a node: as long as the link, the token in it and its role say so."""

from __future__ import annotations

from starlette.requests import Request
from tests.tunnel.test_cloud import Hub
from tests.tunnel.test_session import run

from edgeward.core.authz import Principal, Rule, administrator
from edgeward.core.errors import Unauthorized
from edgeward.tunnel.proxy import TICKET, Proxy, Tickets
from edgeward.tunnel.proxying import Where


def test_what_runs_ends_with_its_link_its_token_and_its_role() -> None:
    async def body() -> None:
        hub, now = Hub(idle=1000.0), [1e9]
        proxy = Proxy(hub, hub._store, hub.audit, b"k" * 32)
        proxy.tickets = Tickets(b"k" * 32, lambda: now[0])
        where = Where("", 80)
        ticket, ends = proxy.tickets.make("token", "n", where)
        who = [administrator("ann")]

        def again() -> Principal:
            if not who:
                raise Unauthorized("the token has ended")
            return who[0]

        path = f"/nodes/n/proxy/80/~{ticket}/ws"
        request = Request({"type": "http", "path": path, "headers": [], "principal": who[0], "again": again})
        assert proxy._still(request, "n", where)
        now[0] = ends - 1
        assert proxy._still(request, "n", where)
        now[0] = ends
        assert ends == 1e9 + TICKET and not proxy._still(request, "n", where)
        now[0] = 1e9
        who[0] = Principal("ann", rules=(Rule(verbs=["tunnel:http:81"], kinds=["Node"]),))
        assert not proxy._still(request, "n", where)
        who.clear()
        assert not proxy._still(request, "n", where)

    run(body)
