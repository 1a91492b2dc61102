"""`scale` and `app versions|rollback`: how many instances an App has, what it was, and the way back.

What is changed is written as any change is: at the hub for all sites, with --at NODE at a site, with the link or
without. The versions are those that nodes keep, so the way back needs nobody's file.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeward.cli.output import emit, full_name, print_rows, write
from edgeward.cli.session import Session, command
from edgeward.cli.versions import To, Wait, check_digits, kept, named, written
from edgeward.core.errors import EdgewardError

Name = Annotated[str, typer.Argument(metavar="APP", help="The App's name.", show_default=False)]


def scale(
    session: Session,
    name: Name,
    replicas: Annotated[int, typer.Option("--replicas", metavar="N", help="Instances per site.", min=0, max=1000)],
) -> None:
    """Set how many instances an App has at each site; nothing is started anew."""
    session.output(allowed=("table",))
    kind, namespace, app = named(session, name, "app")
    with session.api() as api:
        doc = api.patch(kind, namespace, app, {"spec": {"replicas": replicas}})
    write(f"{full_name(doc)} scaled to {replicas}")


app = typer.Typer(no_args_is_help=True, add_completion=False, help="An App's versions, and the way back.")


def versions(session: Session, name: Name) -> None:
    """List the versions of an App that its nodes keep, the present one last."""
    output = session.output(allowed=("table", "json", "yaml"))
    kind, namespace, app = named(session, name, "app")
    with session.api() as api:
        items = kept(api, kind, namespace, app)
    if output != "table":
        emit({"items": items}, output)
        return
    print_rows(["VERSION", "STATE", "MESSAGE"], [[i["version"], i["state"], i.get("message", "")] for i in items])


def rollback(
    session: Session,
    name: Name,
    to: To = "",
    wait: Wait = False,
) -> None:
    """Bring an App's program back as it was: the version before the present one, or one that is kept.

    How many instances there are, where and when stays as it is. Configs and Secrets are what they are now.
    """
    from edgeward.workloads.versions import before, put_back

    session.output(allowed=("table",))
    check_digits(to)
    kind, namespace, app = named(session, name, "app")
    with session.api() as api:
        now: dict[str, Any] = api.get(kind, namespace, app)
        if now["spec"].get("perSite"):
            raise EdgewardError(
                "differs from site to site (perSite), so no version is all of it",
                resource=f"App/{app}",
                remedy="apply what it should be, or drop the entry: edgeward persite",
            )
        items = kept(api, kind, namespace, app)
        past = before(items, to, app)
        done = f"rolled back to {past['version']}"
        written(session, api, kind, now, put_back(now["spec"], past), done, wait=wait)


for _command in (versions, rollback):
    app.command(_command.__name__)(command(_command))
