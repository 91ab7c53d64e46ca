"""Templates render as transformers renders them, and documents come out as parts of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gateway_tokenizers import byte_level_tokenizer, write_model
from transformers import PreTrainedTokenizerFast

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest, NotFound, NotSupported
from spolia_core.tokenizer_files import TokenizerFiles
from spolia_gateway.chat_parts import ReusableText, chat_parts
from spolia_gateway.chat_template import ChatTemplate

CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": 'Say "é".'},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "Again."},
]
TEMPLATES = {
    "turns": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "state": (
        "{%- set ns = namespace(seen=0) -%}\n{%- for m in messages -%}\n  {%- if m.role == 'system' -%}"
        "{%- continue -%}{%- endif -%}\n    {%- set ns.seen = ns.seen + 1 -%}"
        "{{ ns.seen }}:{{ m | tojson }}\n{%- endfor -%}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}{{ bos_token }}"
    ),
    "macros": (
        "{%- macro say(m, upper=false) -%}{{ m.content | upper if upper else m.content }}{%- endmacro -%}\n"
        "{{ bos_token }}{% for m in messages %}{{ say(m, loop.first) }}{% if not loop.last %} / {% endif %}{% endfor %}"
    ),
    "tools": (
        "{%- if tools is not none and tools -%}\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{%- endif -%}"
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    ),
    "documents": (
        "{% if documents %}{% for d in documents %}[{{ loop.index }}] {{ d.title }}: {{ d.text }}\n"
        "{% endfor %}{% endif %}{{ messages[-1].content }}"
    ),
}
DOCUMENTS = [{"title": "one", "text": "The first."}, {"title": "two", "text": "The second </s>."}]


def read(folder: Path) -> ChatTemplate:
    template = ChatTemplate.read(folder, TokenizerFiles.read(folder).tokenizer_config)
    assert template is not None
    return template


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"})


def shown(parts: list[gateway_pb2.PromptPart]) -> list[str]:
    """Texts, documents in brackets."""
    return [part.text if part.WhichOneof("part") == "text" else f"[{part.document.text}]" for part in parts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_renders_as_transformers_renders_it(name: str, tmp_path: Path) -> None:
    model = write_model(
        tmp_path,
        byte_level_tokenizer(),
        bos_token="<s>",
        eos_token={"__type": "AddedToken", "content": "</s>", "special": True},
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=TEMPLATES[name],
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(model)
    for messages in (CHAT, CHAT[1:2]):
        expected = theirs.apply_chat_template(messages, documents=DOCUMENTS, tokenize=False, add_generation_prompt=True)
        assert read(model).render(messages, documents=DOCUMENTS) == expected
        if name == "tools":
            told = theirs.apply_chat_template(WITH_CALLS, tools=[TOOL], tokenize=False, add_generation_prompt=True)
            assert read(model).render(WITH_CALLS, tools=[TOOL]) == told
        texts = [ReusableText(document["text"], document["title"]) for document in DOCUMENTS]
        if name == "documents":
            parts = chat_parts(read(model), messages, texts)
            assert "".join(part.text + part.document.text for part in parts) == expected


def test_a_file_wins_over_the_configuration_and_names_choose(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    model = write_model(tmp_path, byte_level_tokenizer(), chat_template=named)
    assert read(model).render(CHAT) == "plain"
    assert read(model).render(CHAT, tools=[{"type": "function"}]) == "with tools"
    (model / "chat_template.jinja").write_text("of the file")
    assert read(model).render(CHAT) == "of the file"


def test_a_model_without_a_template_has_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", byte_level_tokenizer())
    assert ChatTemplate.read(plain, {}) is None
    for config in ({"chat_template": "{% if %}"}, {"chat_template": [{"name": "rag", "template": "x"}]}):
        with pytest.raises(NotFound, match="template"):
            ChatTemplate.read(plain, config)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].content }}\ud800", "surrogates not allowed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "too big"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_told_in_its_words(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        template_of(source).render(CHAT)
    assert caught.value.field == "messages"


TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells é.", "parameters": {}}}
MADE = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITH_CALLS = [
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": "", "tool_calls": [MADE, MADE]},
    {"role": "tool", "content": "4", "name": "weather"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [MADE]},
    {"role": "tool", "content": "6"},
]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"


def test_tools_are_given_to_templates_that_know_them() -> None:
    assert template_of("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}").knows_tools([TOOL])
    assert template_of("{% macro say() %}{{ tools }}{% endmacro %}{{ say() }}").knows_tools(None)
    assert not template_of("{% set tools = [] %}{{ tools }}{{ messages[0].tools }}").knows_tools([TOOL])
    named = ChatTemplate({"default": PLAIN, "tool_use": "{{ tools[0].function.name }}"}, {})
    assert (named.knows_tools(None), named.knows_tools([TOOL])) == (False, True)
    assert shown(chat_parts(named, WITH_CALLS, tools=[TOOL])) == ["weather"]


def test_a_template_that_knows_no_tools_gets_them_and_calls_and_results_as_text() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    [text] = shown(chat_parts(template_of(PLAIN), WITH_CALLS, tools=[TOOL]))
    system, turns = text.split("[user]", 1)
    assert system.startswith("[system]These functions can be called")
    assert f"\n<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>\n" in system
    assert turns == (
        f"How warm?[assistant]{call}\n{call}"
        "[user]<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
        f"[assistant]Let me see.\n{call}[user]<tool_response>\n6\n</tool_response>"
    )
    assert shown(chat_parts(template_of(PLAIN), WITH_CALLS)) == [f"[user]{turns}"]
    with_words = chat_parts(template_of(PLAIN), CHAT[:2], [ReusableText("one")], tools=[TOOL])
    assert with_words[0].text.startswith("[system]Be <brief> & kind.\n\nThese functions")
    assert shown(with_words)[1:] == ["[one]", 'Say "é".']


def test_tools_that_no_turn_can_tell_are_refused() -> None:
    with pytest.raises(NotSupported, match="leaves out the system turn") as caught:
        chat_parts(template_of("{{ messages[-1].content }}"), CHAT, tools=[TOOL])
    assert caught.value.field == "tools"


def test_documents_stand_where_the_template_puts_them() -> None:
    template = template_of("{% for d in documents %}- {{ d.text | trim }}\n{% endfor %}{{ messages[0].content }}")
    parts = chat_parts(template, CHAT, [ReusableText("one\n"), ReusableText("two")])
    assert shown(parts) == ["- ", "[one\n]", "\n- ", "[two]", "\nBe <brief> & kind."]


def test_documents_a_template_does_not_know_stand_before_the_first_question() -> None:
    template = template_of("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    parts = chat_parts(template, CHAT, [ReusableText("one\n"), ReusableText("one\n")])
    assert shown(parts) == [
        "<system>Be <brief> & kind.<user>",
        "[one\n]",
        "[one\n]",
        'Say "é".<assistant>é<user>Again.',
    ]


def test_a_document_may_hold_what_templates_are_made_of() -> None:
    text = "{{ messages }} {% raw %} </s> DOC"
    parts = chat_parts(
        template_of("{{ messages[0].content }}"), [{"role": "user", "content": "?"}], [ReusableText(text)]
    )
    assert shown(parts) == [f"[{text}]", "?"]


@pytest.mark.parametrize(
    ("source", "messages", "document", "field"),
    [
        ("{{ messages[0].content }}", [{"role": "system", "content": "x"}], ReusableText("d"), "documents"),
        ("{{ messages[0].content }}", [{"role": "user", "content": "x"}], ReusableText("d", "t"), "documents[0].title"),
        ("{{ messages[-1].content }}", [{"role": "user"}, {"role": "assistant"}], ReusableText("d"), "documents"),
    ],
)
def test_a_document_without_a_place_is_refused(
    source: str, messages: list[dict[str, Any]], document: ReusableText, field: str
) -> None:
    with pytest.raises((InvalidRequest, NotSupported)) as caught:
        chat_parts(template_of(source), messages, [document])
    assert caught.value.field == field


def test_a_title_is_printed_or_refused() -> None:
    documents = [ReusableText("one"), ReusableText("two", "is")]
    printing = "{% for d in documents %}{% if d.title %}<{{ d.title | upper }}>{% endif %}{{ d.text }}{% endfor %}"
    assert shown(chat_parts(template_of(printing), CHAT, documents)) == ["[one]", "<IS>", "[two]"]
    untitled = template_of("{% for d in documents %}this is {{ d.text }}{% endfor %}{{ messages[0].content }}")
    with pytest.raises(NotSupported, match="without their titles") as caught:
        chat_parts(untitled, CHAT, documents)
    assert caught.value.field == "documents[1].title"
    assert shown(chat_parts(untitled, CHAT, documents[:1]))[:2] == ["this is ", "[one]"]


def test_a_template_that_leaves_a_document_out_is_refused() -> None:
    first_only = template_of("{{ documents[0].text }}{{ messages[0].content }}")
    with pytest.raises(NotSupported, match=r"documents\[1\]"):
        chat_parts(first_only, CHAT, [ReusableText("a"), ReusableText("b")])


def test_the_demo_model_ships_a_template() -> None:
    demo = Path(__file__).parents[2] / "models" / "demo"
    parts = chat_parts(read(demo), [{"role": "user", "content": "Who?"}], [ReusableText("Ann.\n")])
    assert shown(parts) == ["<s>", "[Ann.\n]", "Question: Who?\nAnswer:"]
    assert json.loads((demo / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
