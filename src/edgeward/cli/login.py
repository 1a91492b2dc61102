"""`login` and `logout`: a person signs in at the issuer that the hub trusts (device flow, RFC 8628)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from edgeward.cli.client import Api
from edgeward.cli.context import context_path, load_context
from edgeward.cli.output import write
from edgeward.cli.session import Session
from edgeward.core.authz import is_access_token
from edgeward.core.errors import EdgewardError, Refused, Unauthorized, Unreachable

_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def login(
    session: Session,
    save: Annotated[str, typer.Option("--save", metavar="FILE", help="Write the context with your token there.")] = "",
) -> None:
    """Sign in with the organisation's account; your token goes into the context file."""
    session.output(allowed=("table",))
    path = Path(save) if save else context_path(session.context)
    known = load_context(session.context)
    if not save and known.token and not is_access_token(known.token):
        raise Refused(
            f"{path} holds the hub's own token, which is the way back in", remedy="keep yours elsewhere: --save FILE"
        )
    if not known.hub_url:
        raise Unreachable(f"the context {known.path} has no hub")
    with Api(known.hub_url.rstrip("/"), ca_file=known.ca_file, who="the hub") as api:
        id_token = _sign_in(api.request("GET", "/api/v1/oidc"))
        made = api.request("POST", "/api/v1/oidc/login", body={"idToken": id_token})
    from edgeward.core.files import write_json

    if known.path.is_dir():  # a hub's folder
        doc = {"hub_url": known.hub_url, "ca_file": known.ca_file}
    else:
        doc = json.loads(known.path.read_text(encoding="utf-8"))
    write_json(path, {**doc, "token": made["token"]})
    write(f"signed in as {made['who']} (role {made['role']}) until {made['expires']}; the token is in {path}")


def logout(session: Session) -> None:
    """End the token that the context holds."""
    session.output(allowed=("table",))
    with session.api() as api:
        ended = api.request("POST", "/api/v1/logout")
    write(f"token {ended['name']} ended")


def _sign_in(about: dict[str, Any]) -> str:
    """The ID token that the issuer gives once the person has agreed in a browser."""
    if not about.get("device"):
        raise Refused("the issuer has no device sign-in", remedy="use a token: edgeward token create --role ROLE")
    client = {"client_id": about["clientId"]}
    started = _ask(about, about["device"], client | {"scope": about["scopes"]})
    if "device_code" not in started:
        raise _denied(started)
    where = started.get("verification_uri_complete") or started.get("verification_uri", "")
    typer.echo(f"open {where}\nand enter the code {started.get('user_code', '')}", err=True)
    pause = min(60.0, float(started.get("interval", 5)))
    until = time.monotonic() + min(1800.0, float(started.get("expires_in", 600)))
    while time.monotonic() < until:
        time.sleep(pause)  # the issuer says how often it may be asked
        got = _ask(about, about["token"], client | {"grant_type": _GRANT, "device_code": started["device_code"]})
        if "id_token" in got:
            return str(got["id_token"])
        if got.get("error") == "slow_down":
            pause += 5
        elif got.get("error") != "authorization_pending":
            raise _denied(got)
    raise Unauthorized("nobody agreed in time", remedy="run it again: edgeward login")


def _denied(answer: dict[str, Any]) -> EdgewardError:
    why = answer.get("error_description") or answer.get("error") or "no ID token in its answer"
    return Unauthorized(f"the issuer refused: {str(why)[:200]}", remedy="run it again: edgeward login")


def _ask(about: dict[str, Any], url: str, form: dict[str, str]) -> dict[str, Any]:
    from edgeward.core.fetch import fetch

    try:
        found = json.loads(fetch(url, urlencode(form).encode(), ca_pem=about.get("ca", "")))
    except (OSError, ValueError) as e:
        raise Unreachable(f"the issuer cannot be asked at {url}: {e}") from None
    return found if isinstance(found, dict) else {}
