"""The body of a request, read as far as it may go."""

import json
from typing import Any

import fastapi
from starlette.requests import ClientDisconnect

from experiments.serving.completion import NAMES, shown
from experiments.serving.refusal import Refusal


async def read_json(request: fastapi.Request, most_bytes: int) -> Any:
    """The body of a request.

    Raises:
      Refusal: it is too large, or not JSON.
    """
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > most_bytes:
                raise Refusal(413, f"The body has more than the {most_bytes} bytes that are allowed.")
    except ClientDisconnect:
        raise Refusal(499, "The client has gone.") from None  # nobody reads it
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Refusal(400, "The body is not JSON in UTF-8.") from None


def _refuse_constant(name: str):
    raise ValueError(name)


def only(body: Any, field: str, kind: type, beside: str = ""):
    """The one field of a body; beside it may stand the model's name, and a field that the caller reads.

    Raises:
      Refusal: it is not of that kind, or another field is there.
    """
    if not isinstance(body, dict) or not isinstance(body.get(field), kind):
        raise Refusal(400, f"{field}: use {NAMES[kind]}.", field)
    if unknown := body.keys() - {field, "model", beside}:
        raise Refusal(400, f"{shown(min(unknown))} is not a known field.")
    return body[field]
