"""Bodies as documents."""

from __future__ import annotations

import pytest

from edgeward.core.body import parse_body
from edgeward.core.errors import Invalid


def test_a_body_key_given_twice_names_the_key() -> None:
    with pytest.raises(Invalid) as caught:
        parse_body(b'{"spec": {"replicas": 1, "replicas": 2}}', "application/json")
    assert (caught.value.field, caught.value.remedy) == ("$.spec.replicas", "keep one of them")
