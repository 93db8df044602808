"""A server of a tiny tree model of bytes, in a thread of this process."""

import contextlib
import json
import threading

import pytest

from experiments.common import loaded
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.models import export

CAPACITY = {"rows": 4, "most_waiting": 12}
MOST_BYTES = 20_000
CONTEXT = 96


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """As experiments/import_model.py writes an OPT: the text of a prompt follows its end token."""
    spec = model_spec(KINDS["leaf"], vocab_size=257, max_seq_len=CONTEXT)
    variables = random_variables(spec)
    # Scores so flat that a sampled text has many kinds of bytes.
    variables["params"]["embed"]["tokens"] *= 0.3
    directory = tmp_path_factory.mktemp("model") / "tiny"
    export.save(str(directory), spec, variables, "bytes", {"begins_with": [256]})
    return directory


@pytest.fixture(scope="session")
def model(exported):
    return loaded.load(None, str(exported)).for_decoding()


@contextlib.contextmanager
def served(model, **options):
    """(the engine, the server's address) while the server runs; options as of `app.build`."""
    for package in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(package, reason=f"the server needs {package}; the extra dev brings it")
    import uvicorn

    from experiments.serving import app, engine

    the_engine, ready = engine.Engine(model, **CAPACITY), threading.Event()
    application = app.build(the_engine, model.name, MOST_BYTES, ready.set, **options)
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="critical", loop="asyncio"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        assert ready.is_set()
        yield the_engine, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def server(model):
    with served(model) as both:
        yield both


# As a model of Qwen's kind has it, with the only special token that bytes have.
TEMPLATE = """
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- bos_token + message.role + ":" + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant:" }}{% endif %}
"""
KEY = "a-key-of-ours"


@pytest.fixture(scope="session")
def chatting(model, tmp_path_factory):
    """The address of a server with a chat template and a key."""
    from experiments.serving import chat_template

    files = tmp_path_factory.mktemp("files")
    (files / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "#"}))
    template = chat_template.read(str(files), model.tokenizer.end_token)
    with served(model, api_key=KEY, template=template) as (_, address):
        yield address


@pytest.fixture(scope="session")
def engine(server):
    return server[0]


@pytest.fixture(scope="session")
def address(server):
    return server[1]


@pytest.fixture(scope="session")
def http(address):
    """A client that sends what no client would."""
    import httpx

    with httpx.Client(base_url=address, timeout=120) as client:
        yield client
