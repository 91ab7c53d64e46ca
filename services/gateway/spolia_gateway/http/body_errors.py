"""What is wrong with a body that does not fit its schema: one field, as OpenAI's clients are told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from spolia_gateway.http.errors import REQUEST, body_of

Problem = Mapping[str, Any]
"""Of pydantic's: where (`loc`), which kind (`type`), and in words (`msg`)."""

UNKNOWN = "extra_forbidden"
MAX_NAME_CHARS = 100
"""Of the name of an unknown field, which may be anything."""

_FIELD = re.compile(r"(?!(str|int|float|bool|list|dict)$)[a-z_]\w*")
"""Names of fields. Types that were tried stand among them, classes with a capital."""
_OTHER_TYPE = ("_type", "_error")
"""How kinds of problems end that say: the value is of another type, or none of the words that the type has."""


def invalid_body(problems: Sequence[Problem]) -> JSONResponse:
    """The answer for a body that does not fit its schema; names the first field that does not."""
    first = problems[0]
    if first["type"] == "json_invalid":
        said = dict(first.get("ctx") or {}).get("error", "")
        return JSONResponse(body_of(f"the body is no JSON: {said}", REQUEST, None, "invalid_json"), 400)
    if first["loc"] == ("body",):
        message = "the body must be a JSON object, sent with content-type application/json"
        return JSONResponse(body_of(message, REQUEST, None, None), 400)
    told = _of_one_field(problems)
    if told[0]["type"] == UNKNOWN:
        param = _joined(path_of(told[0]["loc"][:-1]), str(told[0]["loc"][-1])[:MAX_NAME_CHARS])
        return JSONResponse(body_of(f"unrecognised field {param}", REQUEST, param, "unrecognised_field"), 400)
    param = path_of(told[0]["loc"])
    said = "; or ".join(dict.fromkeys(str(problem["msg"]) for problem in told))
    return JSONResponse(body_of(f"{param}: {said}", REQUEST, param, None), 400)


def path_of(location: Sequence[Any]) -> str:
    """The field a problem is in: messages[0].role of ("body", "messages", 0, "role").

    What stands behind a field of several types is the type that was tried, and no field.
    """
    path = ""
    for step in location[1:]:
        if _is_type(step):
            break
        path = f"{path}[{step}]" if isinstance(step, int) else _joined(path, step)
    return path


def _of_one_field(problems: Sequence[Problem]) -> list[Problem]:
    """Those of the first field that is wrong. A field of several types fails once for each of them: told is what keeps
    the value from being of the type that it looks like, where it looks like one.
    """
    first = problems[0]
    location = first["loc"][:-1] if first["type"] == UNKNOWN else first["loc"]
    at = next((index for index, step in enumerate(location) if _is_type(step)), None)
    if at is None:
        return [first]
    tries = [problem for problem in problems if problem["loc"][:at] == location[:at]]
    likely = [each for each in tries if len(each["loc"]) > at + 1 or not each["type"].endswith(_OTHER_TYPE)]
    if len({problem["loc"][at] for problem in likely}) == 1:
        return _of_one_field([{**each, "loc": (*location[:at], *each["loc"][at + 1 :])} for each in likely])
    return [{**problem, "loc": location[:at], "type": ""} for problem in likely or tries]


def _is_type(step: Any) -> bool:
    return isinstance(step, str) and not _FIELD.fullmatch(step)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
