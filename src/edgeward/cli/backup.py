"""`backup create|verify|restore`: the hub's state as one file that only the recovery key reads.

`create` asks the running hub, or with `--data` works on the folder of one that does not run; the file appears under its
name only when all of it is there and was checked. `verify` looks at every byte, and inside where it finds the key.
`restore` needs no hub. How the file is made is in `hub/backup.py` and `hub/restore.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, command
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused

if TYPE_CHECKING:
    from edgeward.hub.rebuild import Report
    from edgeward.hub.revoked import Revoked

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Keep the hub's state, check it, bring it back.")

KEY_ENV = "EDGEWARD_RECOVERY_KEY"
_KEY_FILE = "recovery.key"

FileName = Annotated[str, typer.Argument(metavar="FILE", show_default=False)]
KeyFile = Annotated[
    str,
    typer.Option("--key", metavar="FILE", help=f"The recovery key; else ${KEY_ENV}, else the hub's, if still there."),
]


WithTokens = Annotated[
    bool, typer.Option("--with-tokens", help="Access tokens are good again, but those known to be revoked since.")
]
RevokedFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--revoked",
        metavar="FILE",
        help="What was revoked since: an `audit export`, or lines `node NAME`, `token NAME`; may be given again.",
    ),
]


def _hub_folder(session: Session) -> Path | None:
    """The folder of the hub that the context names, when it is on this machine."""
    from edgeward.cli.context import load_context

    with contextlib.suppress(EdgewardError):
        ca = load_context(session.context).ca_file
        if ca and Path(ca).parent.name == "identity":
            return Path(ca).parent.parent
    return None


def _read_key(path: Path) -> Any:
    from edgeward.core.seal import RecoveryKey

    try:
        with path.open(encoding="utf-8") as f:
            return RecoveryKey.parse(f.read(64 * 1024), file=str(path))
    except FileNotFoundError:
        raise NotFound("there is no such key file", file=str(path)) from None
    except UnicodeDecodeError:
        raise Invalid("is no recovery key", file=str(path)) from None


def find_key(given: str, key_id: str, folders: list[Path | None]) -> Any:
    """The recovery key with that id; None where none is named and none lies about. A named one must fit."""
    named = given or os.environ.get(KEY_ENV, "")
    if named:
        key = _read_key(Path(named).expanduser())
        if key.id != key_id:
            raise Refused(f"needs the recovery key {key_id}, this one is {key.id}", file=named)
        return key
    for folder in folders:
        for path in (folder / _KEY_FILE, folder / "hub" / _KEY_FILE) if folder else ():
            with contextlib.suppress(EdgewardError, OSError):
                key = _read_key(path)
                if key.id == key_id:
                    return key
    return None


def _signer(hub: Path | None, recipient: bytes) -> bytes:
    """The public key by which the hub at hand signs what it seals to ``recipient``; empty where that is not known."""
    from edgeward.core.files import read_json
    from edgeward.core.seal import SealingKey

    if hub is not None:
        path = hub / "recovery" / "seal.json"
        with contextlib.suppress(EdgewardError, OSError):
            own = SealingKey.parse(read_json(path), file=str(path))
            return own.signer if own.recipient == recipient else b""
    return b""


def _header(path: Path) -> Any:
    from edgeward.core.seal import read_header

    try:
        with path.open("rb") as source:
            return read_header(source, file=str(path))
    except FileNotFoundError:
        raise NotFound("there is no such file", file=str(path)) from None


def _show(session: Session, doc: dict[str, Any], lines: list[str]) -> None:
    output = session.output(allowed=("table", "json", "yaml"))
    if output == "table":
        for line in lines:
            write(line)
    else:
        emit(doc, output)


def _about(notes: dict[str, Any]) -> str:
    return f"backup of {notes.get('made')}, revision {notes.get('revision')}, made by Edgeward {notes.get('version')}"


class _Progress:
    """A counter of bytes on a terminal's stderr; silent elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._done, self._shown = what, 0, -1
        self._tty = sys.stderr.isatty()

    def add(self, size: int) -> None:
        self._done += size
        if self._tty and self._done >> 20 != self._shown:
            self._shown = self._done >> 20
            sys.stderr.write(f"\r{self._what}: {self._done / 2**20:.1f} MiB ")
            sys.stderr.flush()

    def end(self) -> None:
        if self._tty and self._shown >= 0:
            sys.stderr.write("\r\x1b[K")


def create(
    session: Session,
    file: FileName,
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="The folder of a hub that does not run; else ask the hub.")
    ] = "",
    with_streams: Annotated[
        bool, typer.Option("--with-streams", help="With the readings that sites delivered.")
    ] = False,
) -> None:
    """Write the hub's state to a file, encrypted to its recovery key.

    The hub goes on meanwhile. Without --with-streams the readings stay out; what nodes still have comes again.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise Invalid("is a folder", file=str(path), remedy="name a file in it")
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    progress = _Progress("backup")
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:

            def put(piece: bytes) -> None:
                out.write(piece)
                progress.add(len(piece))

            _pieces(session, data, with_streams, put)
            out.flush()
            os.fsync(out.fileno())
        progress.end()
        from edgeward.hub.restore import verify as check

        header = _header(scratch)
        key = find_key("", header.key_id, [Path(data) if data else None, _hub_folder(session)])
        report = check(scratch, key)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    size = path.stat().st_size
    lines = [f"{path}: {size} bytes, {_about(report.notes)}", f"it opens with the recovery key {report.key}"]
    if key is not None:
        lines.append(f"that key lies in the hub's folder still: move {_KEY_FILE} to a safe place")
    _show(session, {"file": str(path), "bytes": size, **report.document()}, lines)


def _pieces(session: Session, data: str, with_streams: bool, put: Callable[[bytes], None]) -> None:
    if not data:
        with session.api() as api:
            query = {"readings": "true"} if with_streams else {}
            for piece in api.stream("/api/v1/backup", query=query, accept="application/octet-stream"):
                put(piece)
        return
    from edgeward.hub.restore import create_offline

    async def offline() -> None:
        async for piece in create_offline(Path(data).expanduser().absolute(), readings=with_streams):
            put(piece)

    asyncio.run(offline())


def verify(session: Session, file: FileName, key: KeyFile = "") -> None:
    """Check every byte of a backup; exit code 3 when one was changed or is missing.

    With the recovery key also what is inside is read, and that this hub wrote it.
    """
    from edgeward.hub.restore import verify as check

    path = Path(file).expanduser()
    header, hub = _header(path), _hub_folder(session)
    found = find_key(key, header.key_id, [hub])
    report = check(path, found, signer=_signer(hub, header.recipient))
    lines = [f"{path}: whole, {_about(report.notes)}"]
    lines.append(
        f"{report.files} files, {report.streams} streams, {report.messages} messages"
        if report.read
        else f"its signature fits; with the recovery key {report.key} it can be read, too: --key FILE"
    )
    _show(session, {"file": str(path), **report.document()}, lines)


def restore(
    session: Session,
    file: FileName,
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="Where the hub shall live.", show_default=False)],
    key: KeyFile = "",
    with_tokens: WithTokens = False,
    revoked: RevokedFiles = None,
) -> None:
    """Bring a hub back from a backup, on this machine or another one. No hub may run there.

    What was there is moved aside. Nodes keep what they have that is newer, and send it. Join tokens are not restored,
    access tokens only --with-tokens. Nodes that its own audit, or FILE, knows to be revoked since are revoked again.
    """
    from edgeward.hub.restore import restore as bring_back

    path, folder = Path(file).expanduser(), Path(data).expanduser().absolute()
    found = key_for(session, path, key, [folder])
    report = asyncio.run(
        bring_back(path, folder, found, with_tokens=with_tokens, revoked=revocations(revoked), say=say_on_terminal)
    )
    report.witnesses += revoked or []
    lines = [f"restored into {report.directory}: {_about(report.notes)}; revisions go on from {report.revision}"]
    if report.moved:
        lines.append(f"what was there is in {report.moved}")
    lines += who_gets_in(report)
    _show(session, {"file": str(path), **report.document()}, lines)


def key_for(session: Session, backup: Path, given: str, folders: list[Path]) -> Any:
    """The key that opens it. Raises ``Refused`` where it is not found."""
    key_id = _header(backup).key_id
    found = find_key(given, key_id, [*folders, _hub_folder(session), backup.absolute().parent])
    if found is None:
        raise Refused(
            f"needs the recovery key {key_id}", file=str(backup), remedy=f"give its file by --key FILE or {KEY_ENV}"
        )
    return found


def revocations(files: list[str] | None) -> Callable[[str], Revoked]:
    """What the files say of revocations since a time, as a restore asks it."""
    from edgeward.hub.revoked import Revoked, of_file

    whole = {name: _whole(Path(name).expanduser()) for name in files or ()}

    def known(since: str) -> Revoked:
        found = Revoked()
        for name, what in whole.items():
            try:
                found.add(of_file(what, since))
            except EdgewardError as e:
                e.file = name
                raise
        return found

    return known


def say_on_terminal(what: str) -> None:
    if sys.stderr.isatty():
        print(what, file=sys.stderr)


def _whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound("there is no such file", file=str(path)) from None


def who_gets_in(report: Report) -> list[str]:
    """What an operator must know, and do."""
    made, lines = report.notes.get("made"), []
    lines.append(f"who knows what was revoked since: {_some(report.witnesses) or 'nobody but you'}")
    if report.revoked:
        lines.append(f"revoked since then, and again: {_some(report.revoked)}")
    if report.nodes:
        lines.append(f"let in as they were at {made}: {_some(report.nodes)}")
        lines.append("  what was revoked since and is among them: edgeward node revoke NAME, once the hub runs")
    if report.left_out:
        lines.append(f"access tokens left out, make new ones (edgeward token create): {_some(report.left_out)}")
    if report.tokens:
        lines.append(f"access tokens that are good again as they were at {made}: {_some(report.tokens)}")
        lines.append("  what was revoked since and is among them: edgeward token revoke NAME, once the hub runs")
    return lines


def _some(names: list[str]) -> str:
    more = len(names) - 20
    return ", ".join(sorted(names)[:20]) + (f" and {more} more" if more > 0 else "")


app.command("create")(command(create))
app.command("verify")(command(verify))
app.command("restore")(command(restore))
