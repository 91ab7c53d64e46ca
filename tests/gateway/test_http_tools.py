"""Tools over HTTP, through the official client: what is asserted is on the objects it parsed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_fakes import FakeDecode
from gateway_tokenizers import byte_level_tokenizer
from http_worlds import HttpWorld, chat_model, http_world, token_of
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion

from spolia.constraint_message import constraint_of
from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import NotSupported
from spolia_core.tools import read_tool_choice

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}{{ m.role }}"
    "{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "<{{ call.id }} {{ call.function.name }} {{ call.function.arguments.city }}>{% endfor %};{% endfor %}"
)
"""Knows tools."""

CHAT: list[Any] = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLS = f"{CALL}\n{CALL.replace('Oslo', 'Rome')}"


def tool(name: str = "weather", **changes: Any) -> Any:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, **changes}}


class Speaker:
    """What a decode node says: sample i the text i, a token a character."""

    def __init__(self) -> None:
        self.texts: Sequence[str] = [CALL]
        self.reason = common_pb2.FINISH_REASON_EOS
        self.error: Exception | None = None

    async def __call__(self, node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        if self.error is not None:
            raise self.error
        has_logprobs = request.sampling.HasField("num_top_logprobs")
        samples = []
        for index, text in enumerate(self.texts):
            for at, char in enumerate(text):
                delta = common_pb2.TokenDelta(
                    token_index=at,
                    token_ids=[token_of("a")],
                    text=char,
                    text_offset=at,
                    sample_index=index,
                    logprobs=[common_pb2.TokenLogprobs(logprob=-0.5)] if has_logprobs else [],
                )
                yield decode_pb2.DecodeServiceGenerateResponse(delta=delta)
            samples.append(common_pb2.SampleFinish(reason=self.reason, num_generated_tokens=len(text)))
        num_generated = sum(sample.num_generated_tokens for sample in samples)
        yield decode_pb2.DecodeServiceGenerateResponse(
            finish=common_pb2.Finish(
                reason=self.reason,
                samples=samples,
                num_prompt_tokens=sum(len(part.token_ids) for part in request.parts),
                num_generated_tokens=num_generated,
                reuse=common_pb2.ReuseReport(mode=request.mode, profile="default", nodes=[node.node_id]),
            )
        )


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("calling"), TEMPLATE)


@pytest.fixture
def speaker() -> Speaker:
    return Speaker()


@pytest.fixture
def decode(speaker: Speaker) -> FakeDecode:
    return FakeDecode("d0", speaker)


@pytest.fixture
async def met(calling: Path, decode: FakeDecode) -> AsyncIterator[HttpWorld]:
    async with http_world(calling, [decode]) as made:
        yield made


def prompt_of(request: Any) -> str:
    ids = [i for part in request.parts for i in part.token_ids]
    return str(byte_level_tokenizer().decode(ids, skip_special_tokens=False))


async def ask(met: HttpWorld, **changes: Any) -> ChatCompletion:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": [tool()]} | changes
    answer = await met.openai.chat.completions.create(**asked)
    assert isinstance(answer, ChatCompletion)
    return answer


async def ask_streaming(met: HttpWorld, **changes: Any) -> tuple[list[Any], ChatCompletion]:
    """The chunks, and what the client's own reader makes of them."""
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": [tool()], "stream": True} | changes
    state = ChatCompletionStreamState(input_tools=asked["tools"])
    chunks = []
    async for chunk in await met.openai.chat.completions.create(**asked):
        chunks.append(chunk)
        list(state.handle_chunk(chunk))
    return chunks, state.current_completion_snapshot


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]


async def test_calls_of_an_answer_have_ids_names_and_arguments(met: HttpWorld, speaker: Speaker) -> None:
    speaker.texts = [f"Let me see.\n{CALLS}"]
    [choice] = (await ask(met)).choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert calls_of(choice) == [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
    calls = choice.message.tool_calls or []
    assert [call.type for call in calls] == ["function", "function"]
    assert len({call.id for call in calls}) == 2
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls), "as the strictest templates want them"


async def test_an_answer_of_calls_alone_has_no_content_and_one_without_calls_no_calls(
    met: HttpWorld, speaker: Speaker
) -> None:
    [choice] = (await ask(met, tool_choice="required")).choices
    assert choice.message.content is None
    speaker.texts = ["Just text."]
    [choice] = (await ask(met)).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Just text.", None, "stop")


@pytest.mark.parametrize("text", [CALL, CALLS, f"Let me see. {CALLS}", "No call.", "1 < 2 <tool", ""])
async def test_a_stream_says_what_the_whole_answer_says(met: HttpWorld, speaker: Speaker, text: str) -> None:
    speaker.texts = [text]
    [whole] = (await ask(met)).choices
    chunks, answer = await ask_streaming(met, stream_options={"include_usage": True})
    [streamed] = answer.choices
    assert (streamed.message.content or "") == (whole.message.content or "")
    assert calls_of(streamed) == calls_of(whole)
    assert streamed.finish_reason == whole.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(text)
    assert chunks[0].choices[0].delta.role == "assistant"


async def test_arguments_stream_in_pieces_under_their_index(met: HttpWorld, speaker: Speaker) -> None:
    speaker.texts = [CALLS]
    chunks, answer = await ask_streaming(met)
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    begun = [piece for piece in pieces if piece.id is not None]
    assert [(piece.index, piece.type, piece.function.name) for piece in begun] == [
        (0, "function", "weather"),
        (1, "function", "weather"),
    ]
    assert [call.id for call in answer.choices[0].message.tool_calls or []] == [piece.id for piece in begun]
    for index in (0, 1):
        arguments = [piece.function.arguments for piece in pieces if piece.index == index]
        assert len(arguments) > 5, "as they are generated"
        assert "".join(arguments) == f'{{"city": "{("Oslo", "Rome")[index]}"}}'
    assert all(chunk.choices[0].delta.content is None for chunk in chunks)


async def test_each_sample_has_calls_of_its_own(met: HttpWorld, speaker: Speaker) -> None:
    speaker.texts = [CALL, "No call.", CALLS]
    whole = (await ask(met, n=3)).choices
    _, answer = await ask_streaming(met, n=3)
    for choices in (whole, answer.choices):
        assert [len(calls_of(choice)) for choice in choices] == [1, 0, 2]
        assert [choice.finish_reason for choice in choices] == ["tool_calls", "stop", "tool_calls"]
        ids = [call.id for choice in choices for call in choice.message.tool_calls or []]
        assert len(set(ids)) == 3


async def test_logprobs_tell_the_tokens_of_calls_too(met: HttpWorld, speaker: Speaker) -> None:
    speaker.texts = [f"Hm. {CALL}"]
    [choice] = (await ask(met, logprobs=True)).choices
    _, answer = await ask_streaming(met, logprobs=True)
    for told in (choice.logprobs, answer.choices[0].logprobs):
        assert told is not None
        assert [entry.logprob for entry in told.content or []] == [-0.5] * len(speaker.texts[0])
    assert calls_of(answer.choices[0]) == calls_of(choice)


REASONS = [(common_pb2.FINISH_REASON_LENGTH, "length"), (common_pb2.FINISH_REASON_STOP, "stop")]


def told_of(choice: Any) -> tuple[str | None, list[tuple[str, str]]]:
    """Content, and calls as they came."""
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content, calls


async def both_ways(met: HttpWorld, **changes: Any) -> list[Any]:
    """The choice of the whole answer, and of the streamed one."""
    [whole] = (await ask(met, **changes)).choices
    _, answer = await ask_streaming(met, **changes)
    return [whole, answer.choices[0]]


def cut_call(size: int) -> list[tuple[str, str]]:
    """What is known of `CALL` when it is cut: its name once that is whole, and then the arguments so far."""
    if size < CALL.index(", "):
        return []
    begin, end = CALL.index('{"city'), CALL.index("}}") + 1
    return [("weather", CALL[begin : max(begin, min(size, end))])]


@pytest.mark.parametrize(("reason", "told"), REASONS)
async def test_a_required_call_is_never_content_wherever_it_is_cut(
    met: HttpWorld, speaker: Speaker, reason: Any, told: str
) -> None:
    speaker.reason = reason
    name_ends = CALL.index(", ")
    for size in sorted({*range(0, len(CALL) + 1, 8), 11, name_ends - 1, name_ends, CALL.index("{", 13), len(CALL)}):
        speaker.texts = [CALL[:size]]
        for choice in await both_ways(met, tool_choice="required"):
            assert (*told_of(choice), choice.finish_reason) == (None, cut_call(size), told), CALL[:size]


@pytest.mark.parametrize(("reason", "told"), REASONS)
async def test_behind_text_or_a_call_a_call_that_is_cut_is_no_content(
    met: HttpWorld, speaker: Speaker, reason: Any, told: str
) -> None:
    speaker.reason = reason
    for size in (*range(len("<tool_"), 16), CALL.index(", "), 50, len(CALL)):
        speaker.texts = [f"Let me see.\n{CALL[:size]}"]
        for choice in await both_ways(met):
            assert (*told_of(choice), choice.finish_reason) == ("Let me see.", cut_call(size), told), CALL[:size]
        speaker.texts = [f"{CALL}\n{CALL[:size]}"]
        for choice in await both_ways(met):
            whole = ("weather", '{"city": "Oslo"}')
            assert (*told_of(choice), choice.finish_reason) == (None, [whole, *cut_call(size)], told), CALL[:size]


@pytest.mark.parametrize("text", ["1 < 2 <", "a list: <to", "One <tool> two", "<tool_call> no JSON", "Just text. "])
async def test_text_that_is_cut_stays_text_where_tools_may_be_called(
    met: HttpWorld, speaker: Speaker, text: str
) -> None:
    speaker.texts, speaker.reason = [text], common_pb2.FINISH_REASON_LENGTH
    for choice in await both_ways(met):
        assert told_of(choice) == (text, [])
        assert choice.finish_reason == "length"


async def test_tokens_of_a_call_that_is_not_told_are_counted_and_have_logprobs(
    met: HttpWorld, speaker: Speaker
) -> None:
    speaker.texts, speaker.reason = [CALL[:20]], common_pb2.FINISH_REASON_LENGTH
    answer = await ask(met, tool_choice="required", logprobs=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 20


async def test_the_choice_becomes_the_nodes_constraint(met: HttpWorld, decode: FakeDecode) -> None:
    tools = [tool("weather"), tool("time")]
    named = {"type": "function", "function": {"name": "time"}}
    for choice, parallel in ((None, None), ("auto", False), ("required", True), ("required", False), (named, None)):
        given = {"tool_choice": choice, "parallel_tool_calls": parallel}
        await ask(met, tools=tools, **{name: value for name, value in given.items() if value is not None})
        expected = read_tool_choice(tools, choice, parallel=parallel is not False).constraint
        assert constraint_of(decode.requests[-1].sampling) == expected
        assert prompt_of(decode.requests[-1]) == "weather time user: hello;", "a named one too is told all"


async def test_tools_that_may_not_be_called_are_not_told_and_nothing_is_a_call(
    met: HttpWorld, decode: FakeDecode
) -> None:
    form: Any = {"type": "json_object"}
    [choice] = (await ask(met, tool_choice="none", response_format=form)).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert prompt_of(decode.requests[-1]) == "user: hello;"
    assert decode.requests[-1].sampling.WhichOneof("constraint") == "json_object"


async def test_an_answer_and_its_results_are_turns_of_the_next_request(met: HttpWorld, decode: FakeDecode) -> None:
    message = (await ask(met)).choices[0].message
    [call] = message.tool_calls or []
    history = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "4"}]}]
    await ask(met, messages=history)
    turns = f"user: hello;assistant: <{call.id} weather Oslo>;tool(weather): 4;"
    assert prompt_of(decode.requests[-1]) == f"weather {turns}"
    body = {"messages": [*CHAT, message.model_dump(), history[2]], "tools": [tool()]}
    tokenized = await met.http.post("/tokenize", json=body)
    ids = [i for part in decode.requests[-1].parts for i in part.token_ids]
    assert tokenized.json()["tokens"] == ids


def made(**changes: Any) -> Any:
    function = {"name": "weather", "arguments": "{}"} | changes
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", None),
    ({"tools": [tool(), {"type": "function"}]}, "tools[1].function", None),
    ({"tools": [tool(), tool("a b")]}, "tools[1].function.name", None),
    ({"tools": [tool(), tool()]}, "tools[1].function.name", None),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", None),
    ({"tools": [tool(description=7)]}, "tools[0].function.description", None),
    ({"tools": [tool()] * 129}, "tools", None),
    ({"tool_choice": "maybe"}, "tool_choice", None),
    ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice.function.name", None),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", None),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", None),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", None),
    ({"response_format": {"type": "json_object"}}, "response_format", "not_supported"),
    ({"ignore_eos": True}, "ignore_eos", None),
    ({"messages": [*CHAT, made(name=3)]}, "messages[1].tool_calls[0].function.name", None),
    ({"messages": [*CHAT, made(arguments={})]}, "messages[1].tool_calls[0].function.arguments", None),
    ({"messages": [*CHAT, made(arguments="[1]")]}, "messages[1].tool_calls[0].function.arguments", None),
    ({"messages": [*CHAT, made(arguments='{"x": NaN}')]}, "messages[1].tool_calls[0].function.arguments", None),
    ({"messages": [*CHAT, made() | {"role": "user", "content": "x"}]}, "messages[1].tool_calls", None),
    ({"messages": [*CHAT, {"role": "tool", "tool_call_id": "1"}]}, "messages[1].content", None),
]


async def test_bad_requests_name_the_field_before_any_node_is_asked(met: HttpWorld, decode: FakeDecode) -> None:
    for change, param, code in BAD:
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT, "tools": [tool()]} | change)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, code), (change, error)
        assert error["type"] == "invalid_request_error"
    assert not decode.requests
    assert met.world.node.gateway.num_running == 0


async def test_a_nodes_refusal_names_the_tool(met: HttpWorld, speaker: Speaker) -> None:
    """The line is that of the grammar: of a named function there is one only, the fifth."""
    tools = [tool("weather"), tool("time")]
    named = {"type": "function", "function": {"name": "time"}}
    for choice, line, param in ((named, 5, "tools[1].function.parameters"), (named, 99, "tools"), ("auto", 1, "tools")):
        said = f"sampling.lark cannot be enforced: at {line}(9): failed: Unimplemented keys"
        speaker.error = NotSupported(said, field="sampling.lark")
        for streams in (False, True):
            with pytest.raises(openai.BadRequestError, match="cannot be enforced") as caught:
                await met.openai.chat.completions.create(
                    model="tiny",
                    messages=CHAT,
                    tools=tools,
                    tool_choice=choice,  # type: ignore[arg-type]  # one of both kinds
                    stream=streams,
                )
            assert (caught.value.param, caught.value.code) == (param, "not_supported")
            assert "sampling." not in caught.value.message
