"""The server's small addresses: /health, OpenAI's /v1/models, and the tokenizer's.

/tokenizer_info, /tokenize and /detokenize have the form that vLLM gave them: with them lm-eval's
`local-completions` needs no tokenizer of its own.
"""

import fastapi

from experiments.common.loaded import Loaded
from experiments.serving.body import only, read_json
from experiments.serving.engine import Engine
from experiments.serving.fields import is_id, shown
from experiments.serving.refusal import Refusal


def add_models(app: fastapi.FastAPI, engine: Engine, name: str) -> None:
    """What is served, and whether it is.

    Args:
      app: gets the addresses.
      engine: what answers.
      name: by which clients ask for the model.
    """
    card = {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "tree_ffn",
        "max_model_len": engine.model.spec.max_seq_len,
    }

    @app.get("/health")
    async def health():
        if not engine.alive:
            raise Refusal(503, "The device's thread has ended.")
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str):
        if wanted != name:
            raise Refusal(404, f"model: {shown(wanted)} is not served here; use {name!r}.", "model")
        return card


def add_tokenizer(app: fastapi.FastAPI, model: Loaded, most_bytes: int) -> None:
    """Text to ids and back, by the model's own tokenizer.

    Args:
      app: gets the addresses.
      model: with its tokenizer.
      most_bytes: of a request's body.
    """
    tokenizer = model.tokenizer

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        return {"name": tokenizer.name, "eos_token": tokenizer.end_token, "vocab_size": tokenizer.vocab_size}

    @app.post("/tokenize")
    async def tokenize(request: fastapi.Request):
        body = await read_json(request, most_bytes)
        text = only(body, "prompt", str, beside="add_special_tokens")
        # Alone, the end token's name means the token; inside a text it is text.
        known = {"": (), tokenizer.end_token: (tokenizer.end_id,)}
        ids = known[text] if text in known else model.prompt(text)[len(model.begins_with) :]
        ids = [*(model.begins_with if body.get("add_special_tokens", True) else ()), *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": model.spec.max_seq_len}

    @app.post("/detokenize")
    async def detokenize(request: fastapi.Request):
        ids = only(await read_json(request, most_bytes), "tokens", list)
        if not all(is_id(i) and 0 <= i < tokenizer.vocab_size for i in ids):
            raise Refusal(400, f"tokens: use whole numbers from 0 to {tokenizer.vocab_size - 1}.", "tokens")
        return {"prompt": tokenizer.decode(ids)}
