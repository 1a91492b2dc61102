"""What lists of places mean; the two that have such lists test the rest (functions/test_reach.py, gateway/test_listener.py)."""  # noqa: E501

from __future__ import annotations

import pytest

from edgeward.core.spans import host_port, is_address, parse_span


def test_brackets_stand_around_an_address_or_a_network() -> None:
    assert parse_span("[2001:db8::/32]:443") == parse_span("[2001:db8::]/32:443")
    assert parse_span("[::1]").high == 65535 and parse_span("10.0.0.0/8:*").low == 1
    for text in ("[::1]/33/4:1", "[2001:db8::/32]/32:1", "::1:5"):
        with pytest.raises(ValueError, match="is no"):
            parse_span(text)


def test_without_a_port_it_is_every_port_unless_one_is_needed() -> None:
    assert parse_span("host").name == "host"
    with pytest.raises(ValueError, match="host:port"):
        parse_span("host", need_port=True)


def test_an_address_and_its_port_can_be_told_apart_again() -> None:
    for host, text in (("192.0.2.1", "192.0.2.1:80"), ("plc-1", "plc-1:80"), ("2001:db8::1", "[2001:db8::1]:80")):
        assert host_port(host, 80) == text
        assert parse_span(text).low == 80
    assert is_address("::1") and not is_address("plc-1") and not is_address("fe80::1%eth0")
