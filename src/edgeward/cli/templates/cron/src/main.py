"""Is called at the times of its trigger, on every node that has it."""


def handler(event, context):
    context.logger.info("called for %s", event.time or "no time", extra={"fields": {"node": context.node}})
    return {"at": event.time}
