"""What `apply` makes of Compose files, as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.cli.imports.compose import env_file, is_compose, translate
from edgeward.cli.imports.taking import Taken
from edgeward.core.errors import Invalid
from edgeward.core.manifest import load

SHOP = """\
name: shop
x-common: &common
  restart: unless-stopped
  logging: {driver: json-file}
services:
  web:
    <<: *common
    image: "registry.example.org/shop/web:${TAG:-1.2}"
    ports: ["8080:80", "127.0.0.1:9000-9001:9000-9001/tcp", "5353:53/udp"]
    env_file: [web.env]
    environment:
      DB_HOST: db
      PRICE: "$$5"
      SECRET_SALT:
    depends_on: {db: {condition: service_healthy}}
    healthcheck:
      test: ["CMD", "curl", "-f", "http://localhost/"]
      interval: 1m30s
      timeout: 10s
      retries: 3
      start_period: 40s
    volumes: ["./nginx.conf:/etc/nginx/nginx.conf:ro", "static:/srv/www", "./html:/srv/html", "/data/web:/data"]
    deploy:
      resources: {limits: {cpus: "0.50", memory: 50M}, reservations: {memory: 20M}}
    configs: [{source: banner, target: /etc/banner}]
    cap_add: [NET_ADMIN]
  db:
    <<: *common
    image: postgres:16
    command: postgres -c 'max_connections=50'
    environment: [POSTGRES_PASSWORD_FILE=/run/secrets/db_password]
    secrets: [db_password]
    volumes: [{type: volume, source: db-data, target: /var/lib/postgresql/data}]
    expose: ["5432"]
    healthcheck: {test: pg_isready -U postgres}
    stop_signal: SIGINT
    stop_grace_period: 1m
  migrate:
    image: shop/migrate
    profiles: [tools]
  once:
    image: shop/once
    entrypoint: [/bin/once]
    command: [--now, "${WHO}"]
volumes: {static: {}, db-data: {}}
configs: {banner: {content: hello}}
secrets: {db_password: {file: db_password.txt}}
"""
FILES = {"web.env": 'MODE=prod # comment\nexport GREETING="hello world"\n', "db_password.txt": "s3cret"}


def read(path: str) -> str:
    name = path.removeprefix("./")
    if name == "html":
        raise IsADirectoryError(21, "Is a directory")
    if name == "nginx.conf":
        return "events {}\n"
    if name not in FILES:
        raise FileNotFoundError(2, "No such file or directory")
    return FILES[name]


def taken(text: str, env: dict[str, str] | None = None, profiles: tuple[str, ...] = ()) -> Taken:
    (manifest,) = load(text, "compose.yaml")
    assert is_compose(manifest.doc)
    return translate(manifest, env or {}, read, profiles)


def made(got: Taken) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m.doc["kind"], m.doc["metadata"]["name"]): m.doc["spec"] for m in got.made}


def test_a_shop_of_several_services() -> None:
    got = taken(SHOP, {"WHO": "me"})
    found = made(got)
    web = found["App", "web"]
    assert web["container"] == {
        "image": "registry.example.org/shop/web:1.2",
        "env": {"MODE": "prod", "GREETING": "hello world", "DB_HOST": "db", "PRICE": "$5"},
        "volumes": [{"name": "static", "path": "/srv/www"}, {"hostPath": "/data/web", "path": "/data"}],
        "ports": {"p80": 80, "p9000": 9000, "p9001": 9001},
    }
    assert web["ports"] == [
        {"name": "p80", "port": 8080},
        {"name": "p9000", "port": 9000},
        {"name": "p9001", "port": 9001},
    ]
    assert web["files"] == [
        {"path": "etc/nginx/nginx.conf", "config": "web-nginx-conf", "key": "data"},
        {"path": "etc/banner", "config": "banner", "key": "data"},
    ]
    assert web["health"] == {
        "exec": {"command": ["curl", "-f", "http://localhost/"]},
        "interval": "1m30s",
        "timeout": "10s",
        "failureThreshold": 3,
        "startup": "40s",
    }
    assert web["limits"] == {"cpu": 0.5, "memory": "50Mi"} and web["dependsOn"] == ["db"] and "restart" not in web
    db = found["App", "db"]
    assert db["container"]["args"] == ["postgres", "-c", "max_connections=50"]
    assert db["files"] == [{"path": "run/secrets/db_password", "secret": "db-password", "key": "data"}]
    assert db["health"]["exec"]["command"] == ["sh", "-c", "pg_isready -U postgres"]
    assert db["stop"] == {"grace": "1m", "signal": "INT"} and db["ports"] == [{"name": "p5432"}]
    assert found["App", "once"]["container"] == {
        "image": "shop/once", "command": ["/bin/once"], "args": ["--now", "me"]
    }  # fmt: skip
    assert found["App", "once"]["restart"] == {"policy": "never"}  # Compose's own default
    assert found["Config", "web-nginx-conf"] == {"data": {"data": "events {}\n"}}
    assert found["Config", "banner"] == {"data": {"data": "hello"}}
    assert found["Secret", "db-password"] == {"data": {"data": "s3cret"}}
    assert found["Service", "web"] == {"app": "web", "port": "p80"} and ("App", "migrate") not in found
    assert {m.doc["metadata"].get("labels", {}).get("project") for m in got.made if m.doc["kind"] == "App"} == {"shop"}


def test_what_is_not_taken_over_is_told_with_its_line() -> None:
    left = {one.field: one for one in taken(SHOP).left}
    assert set(left) == {
        "$",  # WHO is not set
        "$.services.web.ports[2]",  # udp
        "$.services.web.environment",  # SECRET_SALT is the shell's
        "$.services.web.volumes[2]",  # a folder of this machine
        "$.services.web.deploy.resources.reservations",
        "$.services.web.cap_add",
        "$.services.migrate.profiles",
    }
    assert left["$.services.web.cap_add"].line == SHOP[: SHOP.index("cap_add")].count("\n") + 1
    assert str(left["$.services.web.cap_add"]).startswith("compose.yaml:26: $.services.web.cap_add: not taken over:")


def test_a_profile_that_is_asked_for_is_made() -> None:
    assert ("App", "migrate") in made(taken(SHOP, profiles=("tools",)))


def test_long_forms() -> None:
    text = """\
services:
  My_App.v2:
    image: a
    scale: 3
    user: "1000:1000"
    working_dir: /srv
    network_mode: host
    pull_policy: always
    mem_limit: 1g
    cpus: 2
    restart: on-failure:5
    labels: [team=a]
    ports: [{target: 80, published: "8080", protocol: tcp, host_ip: 127.0.0.1, name: http}]
    # on the node's own network the program's own port counts
    volumes: [{type: tmpfs, target: /tmp}, /var/cache/app, {type: bind, source: /dev/x, target: /x, read_only: true}]
    depends_on: [other]
  other: {image: b, healthcheck: {disable: true}, env_file: [{path: none.env, required: false}]}
"""
    got = taken(text)
    app = made(got)["App", "my-app-v2"]
    assert app["replicas"] == 3 and app["limits"] == {"cpu": 2.0, "memory": "1Gi"}
    assert app["restart"] == {"policy": "on-failure"} and app["ports"] == [{"name": "http", "port": 80}]
    container = app["container"]
    assert (container["user"], container["workingDir"], container["network"], container["pull"]) == (
        "1000:1000", "/srv", "host", "always",
    )  # fmt: skip
    assert container["volumes"] == [
        {"name": "my-app-v2-var-cache-app", "path": "/var/cache/app"},
        {"hostPath": "/dev/x", "path": "/x", "readOnly": True},
    ]
    assert [m.doc["metadata"].get("annotations") for m in got.made if m.doc["kind"] == "App"] == [{"team": "a"}, None]
    fields = {one.field for one in got.left}
    assert {"$.services.My_App.v2.ports", "$.services.My_App.v2.restart", "$.services.My_App.v2.volumes[0]"} <= fields


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("services: {a: {build: .}}", "$.services.a.image", "is required"),
        ("services: {a: {image: x, depends_on: [b]}}", "$.services.a.depends_on", "no service 'b'"),
        ("services: {a: {image: x, ports: [http]}}", "$.services.a.ports", "is no port"),
        ("services: {a: {image: x, ports: ['1-3:5-6']}}", "$.services.a.ports", "same length"),
        ("services: {a: {image: x, secrets: [s]}}", "$.services.a.secrets", "does not declare"),
        ("services: {a: {image: x, restart: sometimes}}", "$.services.a.restart", "is not known"),
        ("services: {a: {image: '${TAG:?which}'}}", "$.services.a.image", "TAG is not set: which"),
        ("services: {a: {image: '${TAG'}}", "$.services.a.image", "without }"),
        ("services: {a_b: {image: x}, a-b: {image: y}}", "$.services.a-b", "second time"),
        ("services: {a: {image: x, mem_limit: lots}}", "$.services.a.mem_limit", "is no size"),
        ("services: {a: {image: x, volumes: ['a:b']}}", "$.services.a.volumes", "no absolute path"),
        ("services: {a: {image: x, env_file: gone.env}}", "$.services.a.env_file", "No such file"),
        ("services: {a: {image: x, healthcheck: {test: [curl, x]}}}", "$.services.a.healthcheck.test", "CMD"),
        ("services: {a: [image]}", "$.services.a", "is no mapping"),
    ],
)
def test_what_no_compose_program_takes_is_refused_with_its_field(text: str, field: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as e:
        taken(text)
    assert e.value.field == field and e.value.file == "compose.yaml" and e.value.line == 1


def test_variables_as_the_specification_has_them() -> None:
    text = "services: {a: {image: '%s'}}"
    env = {"A": "x", "E": ""}
    for given, expected in {
        "$A-${A}": "x-x",
        "${E:-d}${E-d}.": "d.",
        "${U-d}": "d",
        "${U:-${A}}": "x",
        "${A:+y}${E:+z}${E+w}": "yw",
        "$$A": "$A",
        "${A:?e}": "x",
    }.items():
        assert made(taken(text % given, env))["App", "a"]["container"]["image"] == expected


def test_an_environment_file() -> None:
    assert env_file("A=1\n# no\nB='x # y'\nC = z \nD=a#b\nexport E=\"q\"\nbad\n") == {
        "A": "1", "B": "x # y", "C": "z", "D": "a#b", "E": "q"
    }  # fmt: skip


def test_texts_that_look_like_variables_mean_themselves() -> None:
    app = made(taken("services: {a: {image: x, command: [sh, -c, 'echo $${HOME} $$$${X}']}}"))["App", "a"]
    # what Edgeward makes of it is ${HOME} $${X}, as Compose's container would see
    assert app["container"]["args"][2] == "echo $${HOME} $$$${X}"
