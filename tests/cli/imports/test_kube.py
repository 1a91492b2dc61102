"""What `apply` makes of Kubernetes manifests, as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.cli.imports.kube import is_kube, translate
from edgeward.cli.imports.kube_pods import words
from edgeward.cli.imports.taking import Taken
from edgeward.core.errors import Invalid
from edgeward.core.manifest import load

SHOP = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: web-conf, namespace: shop}
data:
  nginx.conf: "events {}"
  LEVEL: info
---
apiVersion: v1
kind: Secret
metadata: {name: db, namespace: shop}
type: Opaque
data: {password: czNjcmV0, raw: /w==}
stringData: {user: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
  namespace: shop
  labels: {app: web}
  annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}", team: a}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1}}
  template:
    metadata:
      labels: {app: web, tier: front}
      annotations: {prometheus.io/scrape: "true"}
    spec:
      nodeSelector: {disk: ssd}
      terminationGracePeriodSeconds: 20
      securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}
      tolerations: [{key: edge, operator: Exists}]
      initContainers: [{name: wait, image: busybox}]
      containers:
        - name: web
          image: registry.example.org/web:1.2
          imagePullPolicy: Always
          command: [/bin/web]
          args: ["--level=$(LEVEL)", "--raw=$(HOME)", "--price=$$5", "${X}"]
          ports: [{name: http, containerPort: 8080}, {containerPort: 9090}, {containerPort: 53, protocol: UDP}]
          env:
            - {name: LEVEL, valueFrom: {configMapKeyRef: {name: web-conf, key: LEVEL}}}
            - {name: PASSWORD, valueFrom: {secretKeyRef: {name: db, key: password}}}
            - {name: TOKEN, valueFrom: {secretKeyRef: {name: gone, key: token}}}
            - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
            - {name: EMPTY}
            - {name: PLAIN, value: "a ${b}"}
          envFrom: [{configMapRef: {name: web-conf}}, {secretRef: {name: db}}]
          resources: {limits: {cpu: 500m, memory: 128Mi}, requests: {cpu: 100m}}
          livenessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 5, initialDelaySeconds: 3}
          readinessProbe: {httpGet: {path: /ready, port: http}}
          startupProbe: {httpGet: {path: /healthz, port: http}, failureThreshold: 30, periodSeconds: 10}
          volumeMounts:
            - {name: conf, mountPath: /etc/nginx/nginx.conf, subPath: nginx.conf}
            - {name: keys, mountPath: /run/keys, readOnly: true}
            - {name: data, mountPath: /data}
            - {name: tmp, mountPath: /scratch}
            - {name: log, mountPath: /log}
      volumes:
        - {name: conf, configMap: {name: web-conf}}
        - {name: keys, secret: {secretName: db, items: [{key: password, path: pw}]}}
        - {name: data, persistentVolumeClaim: {claimName: web-data}}
        - {name: tmp, emptyDir: {}}
        - {name: log, hostPath: {path: /var/log/web, type: DirectoryOrCreate}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http, nodePort: 30080}, {name: metrics, port: 9090}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: clean, namespace: shop}
spec:
  schedule: "*/5 * * * *"
  timeZone: Europe/Berlin
  concurrencyPolicy: Forbid
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: OnFailure
          containers: [{name: clean, image: clean, args: ["--now"]}]
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: web, namespace: shop}
spec: {rules: []}
"""


def taken(text: str, namespace: str = "default") -> Taken:
    found = load(text, "shop.yaml")
    assert all(is_kube(m.doc) for m in found)
    return translate(found, namespace)


def made(got: Taken) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m.doc["kind"], m.doc["metadata"]["name"]): m.doc for m in got.made}


def test_a_deployment_with_all_that_people_write() -> None:
    found = made(taken(SHOP))
    app = found["App", "web"]
    assert app["metadata"] == {
        "name": "web", "namespace": "shop", "labels": {"app": "web"}, "annotations": {"team": "a"}
    }  # fmt: skip
    spec = app["spec"]
    assert spec["container"] == {
        "image": "registry.example.org/web:1.2",
        "command": ["/bin/web"],
        "args": ["--level=${LEVEL}", "--raw=$(HOME)", "--price=$$5", "$${X}"],
        "env": {"POD": "${EDGEWARD_INSTANCE}", "EMPTY": "", "PLAIN": "a $${b}"},
        "user": "1000:1000",
        "volumes": [
            {"path": "/data", "name": "web-data"},
            {"path": "/scratch", "name": "web-tmp"},
            {"path": "/log", "hostPath": "/var/log/web"},
        ],
        "ports": {"http": 8080, "p9090": 9090},
        "pull": "always",
    }
    assert spec["replicas"] == 2 and spec["placement"] == {"nodeSelector": {"disk": "ssd"}}
    assert spec["stop"] == {"grace": "20s"} and spec["ports"] == [{"name": "http"}, {"name": "p9090"}]
    assert spec["envFrom"] == [{"config": "web-conf"}, {"secret": "db"}, {"config": "web-env"}, {"secret": "web-env"}]
    assert spec["files"] == [
        {"path": "etc/nginx/nginx.conf", "config": "web-conf", "key": "nginx.conf"},
        {"path": "run/keys/pw", "secret": "db", "key": "password"},
    ]
    assert spec["health"] == {
        "http": {"port": "http", "path": "/healthz"},
        "interval": "5s", "timeout": "1s", "failureThreshold": 3, "startup": "303s",
    }  # fmt: skip
    assert spec["limits"] == {"cpu": 0.5, "memory": "128Mi"} and "restart" not in spec
    assert found["Config", "web-env"]["spec"] == {"data": {"LEVEL": "info"}}
    assert found["Secret", "web-env"]["spec"] == {"data": {"PASSWORD": "s3cret"}}
    assert found["Secret", "db"]["spec"] == {"data": {"password": "s3cret", "user": "shop"}}
    assert found["Namespace", "shop"]["spec"] == {}


def test_services_find_the_apps_of_their_pods() -> None:
    found = made(taken(SHOP))
    assert found["Service", "web"]["spec"] == {"app": "web", "port": "http"}
    assert found["Service", "web-metrics"]["spec"] == {"app": "web", "port": "p9090"}


def test_a_cron_job_is_an_app_with_a_schedule() -> None:
    spec = made(taken(SHOP))["App", "clean"]["spec"]
    assert spec["schedule"] == {"cron": "*/5 * * * *", "zone": "Europe/Berlin"}
    assert spec["restart"] == {"policy": "on-failure"} and spec["container"] == {"image": "clean", "args": ["--now"]}


def test_what_is_not_taken_over_is_told_with_its_line() -> None:
    got = taken(SHOP)
    left = {(one.field, one.why.split(" ")[0]) for one in got.left}
    pod = "$.spec.template.spec"
    assert {f for f, _ in left} == {
        "$.data.raw",
        f"{pod}.initContainers",
        f"{pod}.tolerations",
        f"{pod}.securityContext.fsGroup",
        "$.spec.template.metadata.annotations",
        f"{pod}.containers[0].ports[2]",
        f"{pod}.containers[0].env[2].valueFrom.secretKeyRef",
        f"{pod}.containers[0].env[4].valueFrom.fieldRef.fieldPath",
        f"{pod}.containers[0].readinessProbe",
        f"{pod}.containers[0].resources.requests",
        f"{pod}.containers[0].volumeMounts[3]",
        "$.spec.type",
        "$.spec.ports[0].nodePort",
        "$.spec.ports[1]",
        "$.kind",
    }
    lines = {one.field: one.line for one in got.left}
    assert lines[f"{pod}.tolerations"] == SHOP[: SHOP.index("tolerations")].count("\n") + 1


def test_two_containers_are_two_apps() -> None:
    text = """\
apiVersion: v1
kind: List
items:
- apiVersion: apps/v1
  kind: Deployment
  metadata: {name: pair}
  spec:
    template:
      metadata: {labels: {a: b}}
      spec:
        hostNetwork: true
        containers:
        - {name: one, image: x, ports: [{containerPort: 80}], readinessProbe: {tcpSocket: {port: 80}}}
        - {name: two, image: y, livenessProbe: {exec: {command: [cat, "$HOME"]}}, unknown: 1}
- apiVersion: v1
  kind: Service
  metadata: {name: pair}
  spec: {selector: {a: b}, ports: [{port: 80}]}
"""
    got = taken(text)
    found = made(got)
    assert found["App", "pair-one"]["spec"]["container"] == {"image": "x", "network": "host"}
    assert found["App", "pair-one"]["spec"]["ports"] == [{"name": "p80", "port": 80}]
    assert found["App", "pair-one"]["spec"]["health"]["tcp"] == {"port": "p80"}
    assert found["App", "pair-two"]["spec"]["health"]["exec"] == {"command": ["cat", "$HOME"]}
    assert found["Service", "pair"]["spec"] == {"app": "pair-one", "port": "p80"}
    assert {one.field.rpartition(".")[2] for one in got.left} == {"containers", "readinessProbe", "unknown"}


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("{apiVersion: apps/v1, kind: Deployment, metadata: {name: _}}", "$.metadata.name", "gives no name"),
        ("{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}", "$.spec.template.spec.containers", "required"),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: [x]}", "$.data", "is no mapping"),
    ],
)
def test_what_kubernetes_refuses_too(text: str, field: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as e:
        taken(text)
    assert e.value.field == field and e.value.line == 1


def test_a_service_without_its_pods_is_told() -> None:
    got = taken("{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {selector: {x: y}, ports: [{port: 1}]}}")
    assert not got.made and [one.field for one in got.left] == ["$.spec.selector"]


def test_variables_of_commands() -> None:
    assert words("$(A) $(B) $$(A) $$ ${C} $D", {"A"}) == "${A} $(B) $$(A) $$ $${C} $D"


def test_own_resources_are_not_taken_for_theirs() -> None:
    (own,) = load("{apiVersion: edgeward/v1, kind: Service, metadata: {name: a}}")
    assert not is_kube(own.doc) and not is_kube({"kind": "App"}) and not is_kube([])
