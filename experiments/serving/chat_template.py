"""The template that makes one text of a chat's messages, in the form that transformers gave it.

It stands beside the tokenizer: chat_template.jinja, or "chat_template" of tokenizer_config.json. It is a
program of whoever made the model, so it runs in Jinja's sandbox.
"""

import datetime
import json
import os
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from experiments.common.tokenizer_files import TEMPLATE
from experiments.serving.refusal import Refusal
from tree_ffn.errors import InputError, check_not_pointer, reason
from tree_ffn.json_input import parse_object

CONFIG = "tokenizer_config.json"


class ChatTemplate:
    """A template that is ready.

    Args:
      source: its text.
      names: what it may use beside the messages, such as bos_token.
      where: the file that it came from.

    Raises:
      InputError: it is no template.

    Example:
      >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> ChatTemplate(source, {}, "x").text([{"role": "user", "content": "Hi"}])
      '<user>Hi'
    """

    def __init__(self, source: str, names: dict[str, str], where: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja's own, or Python's of the code that Jinja makes
            raise InputError(f"{where}: its chat template cannot be used ({reason(error)}).") from None
        self._names = names

    def text(self, messages: list[dict[str, Any]]) -> str:
        """The text that the model's next message follows.

        Raises:
          Refusal: the template does not take these messages.
        """
        try:
            return self._template.render(
                self._names, messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # of the template's own, or whatever its expressions raise
            what = reason(error)[:200]
            raise Refusal(
                400, f"messages: the chat template does not take them ({what}).", "messages"
            ) from None


def read(directory: str | None, end_token: str) -> ChatTemplate | None:
    """The template of a tokenizer's directory; None if it has none.

    Args:
      directory: with the tokenizer's files.
      end_token: of the tokenizer, where no file names it.

    Raises:
      InputError: a file cannot be read, or is no template.
    """
    if directory is None:
        return None
    config_file, template_file = os.path.join(directory, CONFIG), os.path.join(directory, TEMPLATE)
    text = _text(config_file)
    config = {} if text is None else parse_object(text, config_file)
    source, where = _text(template_file), template_file
    if source is None:
        source, where = _named(config.get("chat_template")), config_file
    if source is None:
        return None
    names = {"eos_token": end_token}
    for name, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    return ChatTemplate(source, names, where)


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        check_not_pointer(path, text[:40].encode(errors="replace"))
        return text
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _named(value: Any) -> str | None:
    """The template itself, or of several the one called default."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


class _Generation(Extension):
    """{% generation %}, which marks what the model wrote, for training; here it means nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
