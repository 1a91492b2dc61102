"""The lab's file: what it may say, and that every mistake is named with file, field and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeward.core.errors import Invalid
from edgeward.lab.links import BUILTIN, Profile, Stall
from edgeward.lab.topology import MAX_NODES, MAX_SITES, SiteSpec, Topology, check, parse, read


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(
        "backing: relays\nsites:\n  - {name: plant, nodes: 2, link: 4g}\n  - name: a\n"
        "  - {name: far, link: {delay_ms: 50, up_kbit: 1000, stall: {every_s: 60, for_ms: 500}}}\n"
    )
    t = read(path)
    assert t.backing == "relays"
    assert [(s.name, n) for s, n in t.nodes()] == [
        ("plant", "plant-1"),
        ("plant", "plant-2"),
        ("a", "a-1"),
        ("far", "far-1"),
    ]
    assert [s.profile for s in t.sites] == [
        BUILTIN["4g"],
        BUILTIN["lan"],
        Profile(delay_ms=50, up_kbit=1000, stall=Stall(every_s=60, for_ms=500)),
    ]
    assert t.site("far").node_names == ("far-1",)
    assert t.site_of("plant-2") is t.site("plant")
    with pytest.raises(Invalid, match=r"^site: there is no site 'x' in this lab \(sites: plant, a, far\)$"):
        t.site("x")
    with pytest.raises(Invalid, match=r"^node: there is no node 'plant-3' .*nodes: plant-1, plant-2, a-1, far-1\)$"):
        t.site_of("plant-3")


def test_the_bounds_are_taken() -> None:
    sites = tuple(SiteSpec(name=f"s{n}", nodes=MAX_NODES) for n in range(MAX_SITES - 1))
    check(Topology(sites=(*sites, SiteSpec(name="a" * 60))))
    with pytest.raises(Invalid, match="and 4020 more"):
        Topology(sites=sites).site_of("x")


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("sites: [", "", r"^lab.yaml:1: is no YAML.*write it as: sites"),
        ("a: b\n\tc: d", "", r"^lab.yaml:2: is no YAML"),
        ("sites: !!python/object:os.system {}", "", "is no YAML"),
        ("", "$", "expected `object`, got `null`.*write it as"),
        ("[1]", "$", "expected `object`, got `array`"),
        ("{}", "$", "missing required field `sites`"),
        ("sites: []", "$.sites", r"0 sites \(a lab has 1 to 64 sites\)"),
        ("sites: [{name: a}]\nsite: 1", "$", r"unknown field `site` \(fields: sites, backing, between\)"),
        ("sites: [{name: a}]\nbacking: docker", "$.backing", r"\(backing is auto, relays or namespaces\)"),
        ("sites: [{name: a, node: 2}]", "$.sites[0]", r"unknown field `node` \(fields: name, nodes, link\)"),
        ("sites: [{nodes: 2}]", "$.sites[0]", "missing required field `name`"),
        ("sites: [{name: 5}]", "$.sites[0].name", "expected `str`, got `int`"),
        ("sites: [{name: a, nodes: 0}]", "$.sites[0].nodes", r"0 nodes \(a site has 1 to 64"),
        ("sites: [{name: b}, {name: a, nodes: 65}]", "$.sites[1].nodes", "65 nodes"),
        ("sites: [{name: a}, {name: b}, {name: a}]", "$.sites[2].name", r"also the name of \$\.sites\[0\] \(give"),
        ("sites: [{name: a, link: 5g}]", "$.sites[0].link", r"no link '5g' \(use lan, 4g, satellite, bad-dsl, or"),
        (
            "sites: [{name: a, link: {delay: 5}}]",
            "$.sites[0].link",
            r"unknown field `delay` \(fields: name, delay_ms",
        ),
        ("sites: [{name: a, link: {loss: 2}}]", "$.sites[0].link.loss", r"<= 1.*a link is lan, 4g"),
        ("sites: [{name: a, link: {up_kbit: 0}}]", "$.sites[0].link", r"up_kbit is 0; it must be 1 to"),
    ],
)
def test_mistakes(text: str, field: str, says: str) -> None:
    with pytest.raises(Invalid, match=f"(?i){says}") as caught:
        parse(text, file="lab.yaml")
    assert caught.value.file == "lab.yaml"
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "é", "a" * 61, "a b", "a\n"])
def test_names_of_sites(name: str) -> None:
    with pytest.raises(Invalid, match=r"is no site name \(use a-z, 0-9"):
        check(Topology(sites=(SiteSpec(name=name),)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"none.yaml: cannot be read: No such file.*\(give the path of a lab file\)"):
        read(tmp_path / "none.yaml")
    with pytest.raises(Invalid, match="cannot be read: Is a directory"):
        read(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(Invalid, match="is larger than 1 MiB"):
        read(big)
    big.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Invalid, match=r"big.yaml.*is no YAML"):
        read(big)
    big.write_text("[" * 100_000)
    with pytest.raises(Invalid, match="is no YAML"):
        read(big)
