"""Who may ask: whoever has the key, if the server has one."""

import hashlib
import hmac
from collections.abc import Callable, Coroutine

import fastapi

from experiments.serving.refusal import Refusal
from tree_ffn.errors import InputError

# Whoever watches over the server needs no key.
FREE = ("/health",)


def check_key(key: str, where: str) -> None:
    """Raises InputError, which names where a key came from, unless clients can send it in a header."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{where}: use at least one character, all ASCII and no spaces.")


def asks_for(key: str) -> Callable[[fastapi.Request], Coroutine]:
    """What raises Refusal for a request without `Authorization: Bearer KEY`, as a dependency of FastAPI."""
    known = _digest(key)

    async def check(request: fastapi.Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests of one length, compared in a time that says nothing of the key.
        is_known = hmac.compare_digest(_digest(given.strip()), known)
        if request.scope["path"] not in FREE and not (scheme.lower() == "bearer" and is_known):
            raise Refusal(
                401, "The API key is missing or wrong; send it as a bearer token.", code="invalid_api_key"
            )

    return check


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
