"""The file that says which sites a lab has.

In comes YAML::

    sites:
      - {name: plant, nodes: 3, link: 4g}
      - {name: shop, nodes: 1, link: bad-dsl}

out comes a :class:`Topology`, or an ``Invalid`` that names the file, the field and the remedy. Nothing is opened or
started here; ``backing.py`` builds the links that a topology asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from edgeward.core.errors import Invalid
from edgeward.lab.links import BUILTIN, Profile

MAX_SITES = 64
MAX_NODES = 64
#: A node is called ``<site>-<number>`` and must itself fit a DNS label of 63 characters.
MAX_SITE_NAME = 60
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_MAX_FILE = 1 << 20

BackingName = Literal["auto", "relays", "namespaces"]


class SiteSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One site: nodes that share a local network and a link to the hub."""

    name: Annotated[str, Meta(description="a DNS label, at most 60 characters")]
    nodes: Annotated[int, Meta(description="how many nodes, 1 to 64")] = 1
    link: Annotated[str | Profile, Meta(description="lan, 4g, satellite, bad-dsl, or a profile written out")] = "lan"

    @property
    def profile(self) -> Profile:
        """The link's profile. The name was checked by :func:`check`."""
        return self.link if isinstance(self.link, Profile) else BUILTIN[self.link]

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{number}" for number in range(1, self.nodes + 1))


class Topology(Struct, frozen=True, forbid_unknown_fields=True):
    """All sites of a lab, and what emulates their links."""

    sites: tuple[SiteSpec, ...]
    backing: Annotated[
        BackingName,
        Meta(description="relays: TCP relays, no root. namespaces: IP links, root on Linux. auto: relays"),
    ] = "auto"
    between: Annotated[
        Literal["none", "open"],
        Meta(description="namespaces: whether sites reach one another past the hub, over their links, or not at all"),
    ] = "none"

    def nodes(self) -> Iterator[tuple[SiteSpec, str]]:
        """Every node with its site, in the order of the file."""
        for site in self.sites:
            for name in site.node_names:
                yield site, name

    def site(self, name: str) -> SiteSpec:
        for site in self.sites:
            if site.name == name:
                return site
        raise Invalid(
            f"there is no site {name!r} in this lab",
            field="site",
            remedy=f"sites: {_listed(s.name for s in self.sites)}",
        )

    def site_of(self, node: str) -> SiteSpec:
        for site, name in self.nodes():
            if name == node:
                return site
        raise Invalid(
            f"there is no node {node!r} in this lab",
            field="node",
            remedy=f"nodes: {_listed(name for _, name in self.nodes())}",
        )


def read(path: Path) -> Topology:
    """The topology in a file. Raises Invalid."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_FILE + 1)
    except OSError as error:
        raise Invalid(
            f"cannot be read: {error.strerror or error}", file=str(path), remedy="give the path of a lab file"
        ) from error
    if len(raw) > _MAX_FILE:
        raise Invalid("is larger than 1 MiB", file=str(path), remedy="give the path of a lab file")
    return parse(raw, file=str(path))


def parse(text: str | bytes, *, file: str = "") -> Topology:
    """The topology in a YAML text. ``file`` is named in errors. Raises Invalid."""
    try:
        doc: Any = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise Invalid(f"is no YAML: {error.problem}", file=file, line=line, remedy=_EXAMPLE) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Invalid(f"is no YAML: {error}", file=file, remedy=_EXAMPLE) from error
    try:
        topology = msgspec.convert(doc, Topology)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise Invalid(message, field=path.rstrip("`") or "$", remedy=_remedy(message, path), file=file) from error
    check(topology, file=file)
    return topology


def check(topology: Topology, *, file: str = "") -> None:
    """Raises Invalid for what the types cannot say: bounds, names, duplicates, unknown links."""

    def refuse(message: str, field: str, remedy: str) -> None:
        raise Invalid(message, field=field, remedy=remedy, file=file)

    if not 1 <= len(topology.sites) <= MAX_SITES:
        refuse(f"{len(topology.sites)} sites", "$.sites", f"a lab has 1 to {MAX_SITES} sites")
    seen: dict[str, int] = {}
    for index, site in enumerate(topology.sites):
        at = f"$.sites[{index}]"
        if len(site.name) > MAX_SITE_NAME or _LABEL.fullmatch(site.name) is None:
            refuse(
                f"{site.name!r} is no site name",
                f"{at}.name",
                f"use a-z, 0-9 and '-', no '-' at either end, at most {MAX_SITE_NAME} characters",
            )
        if site.name in seen:
            refuse(
                f"{site.name!r} is also the name of $.sites[{seen[site.name]}]",
                f"{at}.name",
                "give each site a name of its own",
            )
        seen[site.name] = index
        if not 1 <= site.nodes <= MAX_NODES:
            refuse(f"{site.nodes} nodes", f"{at}.nodes", f"a site has 1 to {MAX_NODES} nodes")
        if isinstance(site.link, str) and site.link not in BUILTIN:
            refuse(
                f"there is no link {site.link!r}",
                f"{at}.link",
                f"use {', '.join(BUILTIN)}, or write a profile: {{delay_ms: 50, up_kbit: 1000, loss: 0.01}}",
            )


_EXAMPLE = "write it as: sites: [{name: plant, nodes: 3, link: 4g}]"


def _remedy(message: str, path: str) -> str:
    if "unknown field" in message:
        known = Profile if ".link" in path else Topology if path.strip("`") in {"", "$"} else SiteSpec
        return "fields: " + ", ".join(known.__struct_fields__)
    if path.startswith("$.between"):
        return "between is none or open"
    if path.startswith("$.backing"):
        return "backing is auto, relays or namespaces"
    if ".link" in path:
        return f"a link is {', '.join(BUILTIN)}, or a profile: {{delay_ms: 50, up_kbit: 1000, loss: 0.01}}"
    return _EXAMPLE


def _listed(names: Iterator[str]) -> str:
    every = list(names)
    return ", ".join(every[:12]) + (f" and {len(every) - 12} more" if len(every) > 12 else "")
