"""`token create|list|revoke`: what lets boxes join, and keys to the API for people and programs.

A token is shown once, as the last word of what `create` prints, or as ``token`` with `-o json`; the hub keeps no copy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Failures, Session, UsageError, command
from edgeward.core.errors import Conflict, EdgewardError, Forbidden, Invalid, NotFound
from edgeward.core.registry import redact
from edgeward.core.roles import last_used

if TYPE_CHECKING:
    from edgeward.cli.client import Api

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make, list and end tokens.")

Names = Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]
_FORMATS = ("table", "json", "yaml")
#: Lines of a batch file.
MAX_BATCH = 20_000


def create(
    session: Session,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="For a person or program: what it may do.")] = "",
    node: Annotated[str, typer.Option("--node", metavar="NAME", help="For a box: the name that it joins by.")] = "",
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="For a box: the site it stands in.")] = "",
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="DURATION", help="How long it is good for, e.g. 24h (a box's, if not said).")
    ] = "",
    batch: Annotated[
        str, typer.Option("--batch", metavar="FILE", help="For many boxes: a file of lines `NODE [SITE]`; - is stdin.")
    ] = "",
    bundle: Annotated[
        str, typer.Option("--bundle", metavar="FILE", help="For a box without internet: token and options in one file.")
    ] = "",
    wheels: Annotated[
        str, typer.Option("--wheels", metavar="DIR", help="With --bundle: the wheels that the box installs from.")
    ] = "",
    hub: Annotated[str, typer.Option("--hub", metavar="URL", help="With --bundle: where the box finds the hub.")] = "",
    proxy: Annotated[str, typer.Option("--proxy", metavar="URL", help="With --bundle: the proxy before it.")] = "",
    proxy_ca: Annotated[
        str, typer.Option("--proxy-ca", metavar="FILE", help="With --bundle: the CA of a proxy that looks into TLS.")
    ] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Its name in lists and in the audit.")] = "",
    sites: Annotated[
        str, typer.Option("--sites", metavar="A,B", help="Sites whose nodes take it too, also while cut off; * is all.")
    ] = "",
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="Who has it, what for.")] = "",
) -> None:
    """Make a token; it is shown once, as the last word of the output.

    With --role for a person or a program. With --node and --site for one box, which joins by it, once.
    """
    output = session.output(allowed=_FORMATS)
    if (node or batch) and (role or sites or name or description):
        raise UsageError("a token is for a box (--node, --batch) or for a person or program (--role), not for both")
    if (wheels or hub or proxy or proxy_ca) and not bundle:
        raise UsageError("--wheels, --hub, --proxy and --proxy-ca go into a bundle: --bundle FILE")
    if bundle and not (node and site):
        raise UsageError("a bundle is for one box: --node NAME --site NAME")
    if bundle:
        _bundle(session, Path(bundle), node, site, ttl, {"hub": hub, "proxy": proxy}, proxy_ca, wheels)
    elif batch:
        _batch(session, batch, site, ttl, output)
    elif node or site:
        if role or not (node and site):
            raise UsageError("name the box and its site: --node NAME --site NAME")
        _for_box(session, node, site, ttl, output)
    elif role:
        asked: dict[str, Any] = {"role": role, "ttl": ttl, "name": name, "description": description}
        asked["sites"] = [s.strip() for s in sites.split(",") if s.strip()]
        _for_role(session, {k: v for k, v in asked.items() if v}, output)
    else:
        raise UsageError("say whose it is: --role ROLE (see: edgeward get roles), or --node NAME --site NAME of a box")


def _for_role(session: Session, asked: dict[str, Any], output: str) -> None:
    with session.api() as api:
        made = api.request("POST", "/api/v1/issue/accesstoken", body=asked)
    if output in ("json", "yaml"):
        emit(made, output)
    else:
        write(f"token {made['name']} (role {made['role']}) until {made['expires']}, shown this once:\n{made['token']}")


def _for_box(session: Session, node: str, site: str, ttl: str, output: str) -> None:
    with session.api() as api:
        doc = issue(api, node, site, ttl)
    if output != "table":
        emit(doc, output)
        return
    typer.echo(f"good once, for node {node} at site {site}, until {doc['expires']}; on the box:", err=True)
    typer.echo("  edgeward join TOKEN --data DIR", err=True)
    write(doc["token"])


def _bundle(
    session: Session, file: Path, node: str, site: str, ttl: str, way: dict[str, str], proxy_ca: str, wheels: str
) -> None:
    from edgeward.nodes.bundle import Bundle
    from edgeward.nodes.bundle import write as pack
    from edgeward.nodes.enrol_edge import load_ca

    ca = load_ca(Path(proxy_ca)) if proxy_ca else ""
    found = sorted(Path(wheels).glob("*.whl")) if wheels else []
    if wheels and not found:
        raise Invalid("there are no wheels", file=wheels, remedy="in a checkout: pip wheel -w DIR .")
    with session.api() as api:
        doc = issue(api, node, site, ttl)
    count = pack(file, Bundle(doc["token"], node=node, site=site, proxyCa=ca, **way), found)
    write(f"{file}: node {node} of site {site}, {count} wheels, good once until {doc['expires']}")
    typer.echo(f"on the box: edgeward join --bundle {file.name} --data DIR", err=True)
    if count:
        typer.echo(f"or, where nothing is installed: tar xf {file.name} && sh install.sh DIR --enrol-only", err=True)


def issue(api: Api, node: str, site: str, ttl: str, *, replace: bool = False) -> dict[str, Any]:
    """One token of the hub's. A site that is not there yet is declared: a first box often is its site's beginning."""
    ask = {"node": node, "site": site, "replace": replace, **({"ttl": ttl} if ttl else {})}
    try:
        return api.request("POST", "/api/v1/issue/jointoken", body=ask)
    except Invalid as e:
        if not site or f"no Site {site!r}" not in e.message:
            raise
    doc = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": site}, "spec": {}}
    try:
        api.request("POST", "/api/v1/sites", body=doc)
        typer.echo(f"site {site} is new: declared", err=True)
    except Conflict:  # somebody else was faster
        pass
    return api.request("POST", "/api/v1/issue/jointoken", body=ask)


def _batch(session: Session, file: str, site: str, ttl: str, output: str) -> None:
    boxes = read_batch(file, site)
    failures = Failures()
    made = []
    with session.api() as api:
        for node, at in boxes:
            try:
                made.append({"node": node, "site": at, **issue(api, node, at, ttl)})
            except EdgewardError as e:
                failures.add(e)
                continue
            if output == "table":
                write(f"{node} {made[-1]['token']}")
    if output != "table":
        emit({"items": made}, output)
    failures.finish()


def read_batch(file: str, site: str = "") -> list[tuple[str, str]]:
    """Pairs (node, site) of a batch file; blank lines and what stands behind # are left out."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text()
    found = []
    for n, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or (len(words) == 1 and not site):
            raise Invalid(f"{line.strip()[:80]!r}", file=file, line=n, remedy="write NODE SITE, or NODE and --site")
        found.append((words[0], words[1] if len(words) == 2 else site))
    if len(found) > MAX_BATCH:
        raise Invalid(f"{len(found)} boxes", file=file, remedy=f"at most {MAX_BATCH} at once")
    return found


def list_tokens(session: Session) -> None:
    """List tokens: of people and programs with role, end and last use; of boxes with who joined by them."""
    output = session.output(allowed=_FORMATS)
    found: dict[str, list[dict[str, Any]]] = {}
    refused: list[Forbidden] = []
    with session.api() as api:
        for word in ("accesstoken", "jointoken"):
            kind = find_kind(word)
            try:
                found[word] = api.list(kind, None)["items"]
            except Forbidden as e:
                refused.append(e)
    if not found:
        raise refused[0]
    people, boxes = found.get("accesstoken", []), found.get("jointoken", [])
    if output in ("json", "yaml"):
        emit({"items": [redact(i) for i in (*people, *boxes)]}, output)
    elif not people and not boxes:
        typer.echo("no tokens", err=True)
    if output == "table" and people:
        print_rows(["NAME", "ROLE", "EXPIRES", "LAST USED", "SITES"], [_row(i) for i in people])
    if output == "table" and boxes:
        if people:
            write("")
        print_rows(["NAME", "NODE", "SITE", "EXPIRES", "USED", "FROM"], [_box_row(i) for i in boxes])


def _row(item: dict[str, Any]) -> list[object]:
    spec, status = item["spec"], item.get("status") or {}
    used = last_used(status)
    return [item["metadata"]["name"], spec["role"], spec["expires"], used, ",".join(spec.get("sites", []))]


def _box_row(item: dict[str, Any]) -> list[object]:
    spec, status = item["spec"], item.get("status") or {}
    name, used = item["metadata"]["name"], status.get("usedAt", "never")
    return [name, spec["node"], spec["site"], spec["expires"], used, status.get("usedFrom")]


def revoke(session: Session, names: Names) -> None:
    """End tokens at once. A box that joined stays: see `node revoke`."""
    session.output(allowed=("table",))
    failures = Failures()
    with session.api() as api:
        for name in names:
            try:
                _end(api, name)
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"token {name} revoked")
    failures.finish()


def _end(api: Api, name: str) -> None:
    try:
        api.delete(find_kind("accesstoken"), None, name)
    except (NotFound, Forbidden) as e:
        try:
            api.delete(find_kind("jointoken"), None, name)
        except (NotFound, Forbidden):
            raise e from None


app.command("create")(command(create))
app.command("list")(command(list_tokens))
app.command("revoke")(command(revoke))
