"""Answers requests for /NAME."""

from edgeward.functions.sdk import Response


def handler(event, context):
    try:
        asked = event.json()
        who = asked["name"]
    except (ValueError, KeyError, TypeError):
        return Response({"error": 'send JSON like {"name": "edge"}'}, status=400)
    context.logger.info("greeting %s", who)
    return {"hello": who, "version": context.version}
