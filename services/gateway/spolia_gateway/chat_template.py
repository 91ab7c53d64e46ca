"""A model's chat template: messages to text, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from spolia_core.errors import InvalidRequest, NotFound, NotSupported

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"
RESERVED = frozenset({"messages", "documents", "tools", "add_generation_prompt"})
"""Variables that requests set by fields of their own."""


class ChatTemplate:
    """The templates of one model, compiled. Rendering runs in a sandbox: a template comes with the weights, which need
    not be trusted with this process.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises `NotFound` for a template that cannot be compiled, or where none is the default."""
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
            self._knowing_tools = {
                name for name, source in sources.items() if "tools" in _variables(environment, source)
            }
        except jinja2.TemplateError as error:
            raise NotFound(f"the model's chat template cannot be compiled: {error}", field="model") from error
        if DEFAULT not in self._templates:
            names = ", ".join(sorted(sources))
            raise NotFound(f"of the model's chat templates none is the default; it has {names}", field="model")
        self._special_tokens = dict(special_tokens)
        for template in self._templates.values():
            template.globals = dict(template.globals)  # rendering copies them: half its time where they are chained

    @classmethod
    def read(cls, model: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a Hugging Face-format directory: its files, else its tokenizer_config.json; None without."""
        sources = _sources(model, tokenizer_config)
        return cls(sources, _special_tokens(tokenizer_config)) if sources else None

    def knows_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template for a chat with `tools`, or without any, reads them from its variable."""
        return self._name(tools) in self._knowing_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the assistant's answer begins. Slow for long chats: keep it off the event loop.

        Raises `InvalidRequest` with the template's words where it refuses the messages or fails on them.
        """
        template = self._templates[self._name(tools)]
        values = self._special_tokens | dict(variables or {})
        try:
            rendered = template.render(
                **values, messages=messages, documents=documents, tools=tools, add_generation_prompt=True
            )
            rendered.encode()  # JSON can spell what is no Unicode text
            return rendered
        except Exception as error:  # a template is a program: what it meets in the messages may raise anything
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", field="messages"
            ) from error

    def _name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return WITH_TOOLS if tools and WITH_TOOLS in self._templates else DEFAULT


def no_template(model_name: str) -> NotSupported:
    """The error for chat with a model that has no template."""
    return NotSupported(
        f"model {model_name!r} has no chat template ({TEMPLATE_FILE}, or chat_template in tokenizer_config.json); "
        "ask /v1/completions",
        field="messages",
        limit="models with a chat template",
        actual=model_name,
    )


def _sources(model: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Template text by name; files win over the configuration, as they do in transformers."""
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):
        found = {str(entry["name"]): str(entry["template"]) for entry in given}
    else:
        found = {DEFAULT: given} if isinstance(given, str) else {}
    path = model / TEMPLATE_FILE
    try:
        if path.is_file():
            found[DEFAULT] = path.read_text(encoding="utf-8")
        for named in sorted((model / NAMED_TEMPLATES).glob("*.jinja")):
            found[named.stem] = named.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NotFound(f"no readable chat template in {model}: {error}", field="model", actual=str(model)) from error
    return found


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """What templates know as bos_token, eos_token and so on."""
    named = dict(tokenizer_config)
    extra = tokenizer_config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _variables(environment: jinja2.Environment, source: str) -> set[str]:
    """Names a template reads that it does not set itself."""
    return jinja2.meta.find_undeclared_variables(environment.parse(source))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = _PlainNamespace
    return environment


class _Generation(Extension):
    """The block that marks the assistant's words for training; what it holds is rendered, and that is all."""

    tags = {"generation"}  # noqa: RUF012  # declared so by its base class

    def parse(self, parser: Parser) -> CallBlock:
        """Reads up to the end of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = CallBlock(self.call_method("_as_it_is"), [], [], body)
        block.set_lineno(line)
        return block

    def _as_it_is(self, caller: Any) -> Any:
        return caller()


class _PlainNamespace(Namespace):
    """A namespace without names that lead into the interpreter."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")
        super().__setitem__(name, value)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as text: Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
