"""The body of a request, read as far as it may go."""

import asyncio
from typing import Any

import fastapi
from starlette.requests import ClientDisconnect

from experiments.serving.fields import NAMES, shown
from experiments.serving.refusal import Refusal
from tree_ffn.json_input import parse_json

# A client that sends more slowly would hold its connection for ever.
MOST_SECONDS = 60


async def read_json(request: fastapi.Request, most_bytes: int) -> Any:
    """The body of a request.

    Raises:
      Refusal: it is too large, does not come to an end, or is not JSON.
    """
    try:
        async with asyncio.timeout(MOST_SECONDS):
            content = await _read(request, most_bytes)
    except TimeoutError:
        raise Refusal(408, f"The body did not come to its end within {MOST_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise Refusal(499, "The client has gone.") from None  # nobody reads it
    return parse_json(content, "The body")


async def _read(request: fastapi.Request, most_bytes: int) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most_bytes:
            raise Refusal(413, f"The body has more than the {most_bytes} bytes that are allowed.")
    return bytes(content)


def only(body: Any, field: str, kind: type, beside: str = ""):
    """The one field of a body; beside it may stand the model's name, and a field that the caller reads.

    Args:
      body: of the request, parsed.
      field: its name.
      kind: its type.
      beside: name of a field that may stand there, too.

    Raises:
      Refusal: it is not of that kind, or another field is there.
    """
    if not isinstance(body, dict) or not isinstance(body.get(field), kind):
        raise Refusal(400, f"{field}: use {NAMES[kind]}.", field)
    if unknown := body.keys() - {field, "model", beside}:
        raise Refusal(400, f"{shown(min(unknown))} is not a known field.")
    return body[field]
