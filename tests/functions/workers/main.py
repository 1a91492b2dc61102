"""What the conformance suite asks of a handler, in Python."""

import logging

from edgeward.functions.sdk import Response


def handler(event, context):
    what = event.type.removeprefix("conformance.")
    if what == "echo":
        return Response(event.data, headers={"content-type": event.datacontenttype or "application/octet-stream"})
    if what == "attributes":
        told = [event.id, event.source, event.type, event.subject, event.time, event.extensions["traceparent"]]
        return "\n".join(told)
    if what == "http":
        http = event.http
        headers = ",".join(f"{k}={v}" for k, v in http.headers)
        return "\n".join([http.method, http.path, http.query, headers, http.client])
    if what == "status":
        return Response(b"", int(event.data), {"X-Conformance": "yes"})
    if what == "stream":
        return (f"piece {n}\n" for n in range(int(event.data)))
    if what == "large":
        return bytes(int(event.data))
    if what == "log":
        context.logger.log(logging.WARNING, event.text())
        return None
    raise ValueError(event.text())
