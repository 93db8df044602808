"""Answers OpenAI's form of text completion over HTTP.

    python -m experiments.serve --export=exported/opt --port=8000
    python -m experiments.serve --workdir=runs/tree --name=tree

    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "The tree", "max_tokens": 20}'
    lm_eval --model local-completions --tasks=... \\
        --model_args=model=opt,base_url=http://127.0.0.1:8000/v1/completions,max_length=2048

Requests are continued together, up to --rows at once, and --waiting more wait; then clients get 429. The
text of a prompt follows the ids with which an imported model's texts begin (OPT's </s>, which echo with
logprobs lists too); ids are taken as they are. With --api_key clients must send the key; without one, whoever
reaches the port may ask. /v1/chat/completions needs a chat template beside the tokenizer's files:
chat_template.jinja, or that of tokenizer_config.json. /metrics has counts in Prometheus' form.
SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C let what is under way come to its end, for at most --grace seconds; then
it is refused.
"""

import os
import signal
import socket
import sys

from absl import flags

from experiments.common import cli, loaded, path_flags
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.inference.batching import generate
from tree_ffn.training.signals import Interrupted, StopSignals
from tree_ffn.tree.kernels import first_use

KEY_NAME = "TREE_FFN_API_KEY"
_WORKDIR = path_flags.define("workdir", None, "Directory of a training run; its best checkpoint is used.")
_EXPORT = path_flags.define("export", None, "Directory of an exported model (experiments/export.py).")
_TOKENIZER = path_flags.define_each("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_NAME = flags.DEFINE_string("name", None, "What clients call the model; by default the directory's name.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of the machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any that is free.")
_API_KEY = flags.DEFINE_string(
    "api_key", None, f"What clients must send; by default {KEY_NAME} of the environment; none: no key."
)
_ROWS = flags.DEFINE_integer("rows", 8, "The most sequences that are continued at once.")
_WAITING = flags.DEFINE_integer("waiting", 256, "The most that wait beside them; then clients get 429.")
_MAX_BODY = flags.DEFINE_integer("max_body", 4 << 20, "The most bytes of a request.")
_GRACE = flags.DEFINE_integer("grace", 30, "Seconds for what is under way when the server is to end.")


def main() -> None:
    try:
        from experiments.serving import access, app, chat_template, engine, server
    except ImportError as error:
        raise InputError(
            f"serve: the package {error.name} is missing; pip install 'tree_ffn[serve]'."
        ) from None
    for flag, least in ((_PORT, 0), (_ROWS, 1), (_WAITING, 0), (_MAX_BODY, 1), (_GRACE, 0)):
        check_positive_int(f"--{flag.name}", flag.value, least=least)
    key = os.environ.get(KEY_NAME) if _API_KEY.value is None else _API_KEY.value
    if key is not None:
        access.check_key(key, KEY_NAME if _API_KEY.value is None else "--api_key")
    listening = _listen(_HOST.value, _PORT.value)
    with listening, StopSignals() as stop:
        first_use.build("cpu", "gpu")
        model = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value).for_decoding()
        template = chat_template.read(model.files, model.tokenizer.end_token)
        generate(model.spec, model.variables, [model.prompt("")], 1)  # raises where its scores are no numbers
        name = _NAME.value or model.name
        where = f"http://{_HOST.value}:{listening.getsockname()[1]}"
        ready = lambda: print(f"{name} answers at {where}/v1/completions", flush=True)
        device = engine.Engine(model, _ROWS.value, _WAITING.value)
        application = app.build(device, name, _MAX_BODY.value, ready, key, template)
        running = server.Server(application, device, _GRACE.value, stop)
        # uvicorn takes SIGTERM and SIGINT while it runs; afterwards it hands them on to `stop`.
        running.run(sockets=[listening])
        if not running.started and stop.received is None:
            sys.exit(1)  # it has said why
    if stop.received is not None:
        said = "The server has ended; answers under way were ended, or given up."
        if stop.received == signal.SIGINT:
            raise Interrupted(said, stop.received)
        print(said, file=sys.stderr, flush=True)  # to be told to end is how a server is done: 0


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        what = getattr(error, "strerror", None) or error
        raise InputError(f"--port: {port} of {host!r} cannot be listened at ({what}); use another.") from None
    return listening


if __name__ == "__main__":
    cli.run(main)
