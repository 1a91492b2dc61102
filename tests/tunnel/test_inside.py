"""Whose App a stream of exec is for: named by one function at the hub and at the node, or by nothing."""

from __future__ import annotations

import os
import pwd
from typing import Any

import pytest

from edgeward.core.errors import Invalid
from edgeward.core.resource import Key
from edgeward.tunnel.exec import parse, told
from edgeward.tunnel.inside import account_of, app_of


def test_an_app_is_named_whole_or_not_at_all() -> None:
    assert app_of("exec", {"app": "shop/web"}) == Key("App", "shop", "web")
    assert app_of("exec", {"argv": ["id"]}) is None
    assert app_of("exec", {"app": ""}) is None
    for service in ("shell", "copy", "tcp"):  # these are of the node, whatever else they say
        assert app_of(service, {"app": "shop/web"}) is None


@pytest.mark.parametrize("text", ["web", "/web", "shop/", "a/b/c", "Shop/web", "shop/../web", 7, ["shop/web"], None])
def test_what_names_no_app_is_refused(text: Any) -> None:
    with pytest.raises(Invalid):
        app_of("exec", {"app": text})


@pytest.mark.parametrize(
    ("more", "login"),
    [({"env": {"LD_PRELOAD": "/x"}}, False), ({"cwd": "/"}, False), ({}, True), ({"app": "", "instance": "i"}, False)],
)
def test_inside_an_app_nobody_brings_a_folder_or_variables(more: dict[str, Any], login: bool) -> None:
    args = {"argv": ["id"], "app": "shop/web"}
    assert parse(args, login=False).app == "shop/web"
    with pytest.raises(Invalid):
        parse(args | more, login=login)


def test_the_audit_names_app_and_instance() -> None:
    assert told("exec", {"argv": ["id"], "app": "shop/web", "instance": "i"}) == {
        "argv": ["id"], "app": "shop/web", "instance": "i",
    }  # fmt: skip


def test_the_account_is_the_instances() -> None:
    assert account_of({}).uid is None
    assert account_of({}).name == pwd.getpwuid(os.geteuid()).pw_name
    one = account_of({"user": 54321, "group": 54322, "extra_groups": [54323]})
    assert (one.name, one.uid, one.gid, one.groups) == ("54321", 54321, 54322, (54323,))
