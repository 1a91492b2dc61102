"""Breaks Japanese, Chinese or Thai text where a reader would, for signs and screens that are narrow.

These languages write no spaces, so where a line may end takes a model. BudouX's are small enough (35 to 65 kB each) to
come in its wheel: nothing is downloaded when this runs. In: text, `?language=ja` (or zh-hans, zh-hant, th). Out: its
phrases, as JSON.
"""

from functools import cache
from urllib.parse import parse_qs

import budoux

from edgeward.functions.sdk import Response

LOADERS = {
    "ja": budoux.load_default_japanese_parser,
    "zh-hans": budoux.load_default_simplified_chinese_parser,
    "zh-hant": budoux.load_default_traditional_chinese_parser,
    "th": budoux.load_default_thai_parser,
}


@cache
def parser(language):
    return LOADERS[language]()


parser("ja")  # while the version is still proving itself, not in the first call


def handler(event, context):
    query = parse_qs(event.http.query) if event.http else {}
    language = query.get("language", ["ja"])[0]
    if language not in LOADERS:
        return Response({"error": f"no model for {language[:20]!r}", "languages": sorted(LOADERS)}, 422)
    return {"language": language, "phrases": parser(language).parse(event.text())}
