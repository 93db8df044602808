"""/v1/chat/completions as the client of OpenAI sees it: a template's text, continued as any prompt is."""

import functools
import json

import pytest

from tests.experiments.serving.conftest import CONTEXT, KEY

openai = pytest.importorskip("openai", reason="the client openai is not installed; the extra dev brings it")
MESSAGES = [{"role": "system", "content": "né"}, {"role": "user", "content": "Hi"}]
END = 256
IDS = [*"#system:né".encode(), END, *b"#user:Hi", END, *b"assistant:"]


@pytest.fixture(scope="module")
def client(chatting):
    with openai.OpenAI(base_url=f"{chatting}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def create(client):
    return functools.partial(client.chat.completions.create, model="tiny", messages=MESSAGES)


ASKED = {"seed": 4, "n": 2, "temperature": 1.4}


def test_a_chat_is_its_template_s_text_continued(client, create):
    found = create(**ASKED, max_completion_tokens=12, logprobs=True, top_logprobs=3)
    wanted = client.completions.create(model="tiny", prompt=IDS, max_tokens=12, logprobs=3, **ASKED)
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl-")
    assert found.usage == wanted.usage and found.usage.prompt_tokens == len(IDS)
    for one, other in zip(found.choices, wanted.choices, strict=True):
        assert (one.message.role, one.message.content) == ("assistant", other.text)
        assert one.finish_reason == other.finish_reason and one.index == other.index
        told = one.logprobs.content
        assert [token.logprob for token in told] == pytest.approx(other.logprobs.token_logprobs, abs=1e-5)
        for token, name, top in zip(told, other.logprobs.tokens, other.logprobs.top_logprobs, strict=True):
            assert token.token == name
            assert [likely.token for likely in token.top_logprobs] == list(top)[:3]
    # Bytes are told of parts of characters too: together they are the text.
    for one in found.choices:
        told = [token for token in one.logprobs.content if token.token != "<|endoftext|>"]
        content = b"".join(bytes(token.bytes) for token in told)
        assert content.decode(errors="replace") == one.message.content


def test_a_stream_says_who_speaks_then_what_then_why_it_ended(create):
    whole = create(**ASKED, max_tokens=12, logprobs=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(create(**ASKED, max_tokens=12, logprobs=True, **options))
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece.id for piece in pieces}) == 1 and pieces[-1].usage == whole.usage
    for i, wanted in enumerate(whole.choices):
        first, *parts, last = [c for piece in pieces for c in piece.choices if c.index == i]
        assert (first.delta.role, first.delta.content) == ("assistant", "")
        assert "".join(part.delta.content for part in parts) == wanted.message.content
        assert sum(len(part.logprobs.content) for part in parts) == len(wanted.logprobs.content)
        assert {part.finish_reason for part in (first, *parts)} == {None}
        assert last.finish_reason == wanted.finish_reason and last.delta.content is None


def test_without_a_number_the_rest_of_the_context_is_used(create):
    answer = create(temperature=0, logit_bias={"256": -100})
    assert answer.usage.total_tokens == CONTEXT and answer.choices[0].finish_reason == "length"
    never_ends = {"256": -100}  # a model that knows nothing may draw the end at once
    cut = create(max_tokens=3, logit_bias=never_ends, extra_body={"truncate_prompt_tokens": 5})
    assert (cut.usage.prompt_tokens, cut.usage.completion_tokens) == (5, 3)


def test_content_may_be_in_parts(create):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    answers = [
        create(messages=[{"role": "user", "content": content}], max_tokens=5, seed=1).choices[0].message
        for content in (parts, "H\ni")
    ]
    assert answers[0] == answers[1]


def user(**fields):
    return [{"role": "user", "content": "a"} | fields]


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": ["a"]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": user(content=None)}, "messages"),
        ({"messages": user(content=[{"type": "image_url", "image_url": {"url": "x"}}])}, "messages"),
        ({"messages": user(name=3)}, "messages"),
        ({"messages": user(tool_calls=[{}])}, "messages"),
        ({"messages": user(role="tool")}, "messages"),
        ({"messages": user(content="x" * 200)}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "3"}, "max_completion_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"echo": True}, "echo"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(create, fields, field):
    with pytest.raises(openai.BadRequestError) as caught:
        create(messages=user(), extra_body=fields)
    assert caught.value.param == field and caught.value.message.count("\n") == 0


def test_half_of_a_surrogate_pair_is_refused(chatting):
    import httpx

    content = json.dumps({"messages": user(content="\ud83d")})  # ASCII
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{chatting}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400 and "half of a surrogate pair" in answer.json()["error"]["message"]


def test_a_template_s_own_words_reach_the_client(create):
    with pytest.raises(openai.BadRequestError, match=r"does not take them \(no role tool\)\."):
        create(messages=[{"role": "tool", "content": "a"}])


def test_a_model_without_a_template_says_so(http):
    answer = http.post("/v1/chat/completions", content=json.dumps({"messages": MESSAGES}))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "messages: this model has no chat template; use /v1/completions."
    )
