"""Is called with each reading; says when a sensor gets hot, once."""

LIMIT = 80.0


def handler(event, context):
    sensor = event.subject.split("/")[1]
    value = float(event.text())  # what is no number fails: after its retries it is a dead letter, with the reason
    hot, before = value > LIMIT, context.state.get(sensor) == b"hot"
    if hot and not before:
        context.logger.warning("%s is at %s", sensor, value)
        context.publish(f"alarms/{sensor}", {"sensor": sensor, "temperature": value})
    if hot != before:
        context.state.set(sensor, b"hot" if hot else b"cool")
    return {"sensor": sensor, "hot": hot}
