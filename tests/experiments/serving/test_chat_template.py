"""Templates as transformers' tokenizers bring them: found, run in a sandbox, refused in one sentence."""

import datetime
import json

import pytest

from tree_ffn.errors import InputError

pytest.importorskip("jinja2", reason="jinja2 is not installed; the extra serve brings it")
from experiments.serving.chat_template import ChatTemplate, read
from experiments.serving.refusal import Refusal

ASKED = [{"role": "user", "content": "<é>"}]


NAMED = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    "files, text",
    [
        ({}, None),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, None),
        ({"tokenizer_config.json": {"chat_template": "c{{ eos_token }}", "eos_token": {"content": ""}}}, "c"),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, None),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "d"),
        ({"chat_template.jinja": "\ufeffj{{ eos_token }}"}, "j<end>"),
        (
            {"chat_template.jinja": "j{{ bos_token }}",
             "tokenizer_config.json": {"chat_template": "c", "bos_token": "<s>"}},
            "j<s>",
        ),
    ],
)  # fmt: skip
def test_where_a_template_is_found(tmp_path, files, text):
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(content, encoding="utf-8")
    template = read(str(tmp_path), "<end>")
    assert (template and template.text(ASKED)) == text
    assert read(None, "<end>") is None


@pytest.mark.parametrize(
    "source, text",
    [
        ("{% for m in messages %}\n  {{ m['content'] }}\n{% endfor %}", "  <é>\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{% for m in messages %}{% break %}{% endfor %}.", "."),
        ("{{ none_such }}{{ tools is none }}{{ add_generation_prompt }}", "TrueTrue"),
    ],
)
def test_the_language_of_templates(source, text):
    assert ChatTemplate(source, {}, "x").text(ASKED) == text


def test_templates_know_the_day():
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}, "x").text(ASKED) == f"{datetime.date.today():%Y}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages + 1 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_a_template_does_not_take(source):
    with pytest.raises(Refusal) as caught:
        ChatTemplate(source, {}, "x").text(ASKED)
    assert (caught.value.status, caught.value.field) == (400, "messages")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("chat_template.jinja", b"{% for %}", "its chat template cannot be used"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.jinja", b"{% break %}", "its chat template cannot be used"),
        (
            "chat_template.jinja",
            b"version https://git-lfs.github.com/spec/v1\nsize 2\n",
            "is a pointer of git-lfs",
        ),
        ("tokenizer_config.json", b"[" * 9999, "nested too deeply"),
        ("tokenizer_config.json", b"3", "is no JSON object"),
        ("tokenizer_config.json", b'{"chat_template": "{{"}', "its chat template cannot be used"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        read(str(tmp_path), "<end>")
