"""Chats that are answered, over gRPC and HTTP: hardly one that is drawn field by field is, and what stands behind the
checks would go untried.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tiny_cluster import LETTERS

from spolia.v1 import common_pb2, gateway_pb2

MAX_TOKENS = 3

_texts = st.text(LETTERS, min_size=1, max_size=24)
_documents = st.lists(st.text(LETTERS, min_size=1, max_size=60), max_size=3)
_systems = st.none() | _texts


def _turns() -> st.SearchStrategy[list[tuple[str, str]]]:
    """Roles and what they say: perhaps a system's word, then a user and an assistant by turns, a user last."""

    def told(system: str | None, said: list[str]) -> list[tuple[str, str]]:
        begin = [] if system is None else [("system", system)]
        last = len(said) - 1
        return begin + [("user" if (last - at) % 2 == 0 else "assistant", text) for at, text in enumerate(said)]

    said = st.lists(_texts, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1)
    return st.builds(told, _systems, said)


def _samplings() -> st.SearchStrategy[common_pb2.SamplingParams]:
    return st.builds(
        common_pb2.SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_p=st.sampled_from([0.1, 1.0]),
        top_k=st.integers(0, 5),
        max_tokens=st.integers(1, MAX_TOKENS),
        num_samples=st.integers(1, 2),
        stop=st.lists(_texts, max_size=2),
        seed=st.none() | st.integers(0, 2**64 - 1),
        num_top_logprobs=st.none() | st.integers(0, 3),
        ignore_eos=st.booleans(),
    )


def _messages(turns: list[tuple[str, str]]) -> list[gateway_pb2.ChatMessage]:
    return [gateway_pb2.ChatMessage(role=role, content=content) for role, content in turns]


def generate_chats() -> st.SearchStrategy[gateway_pb2.GenerateRequest]:
    """For Generate."""
    return st.builds(
        lambda turns, documents, sampling, mode: gateway_pb2.GenerateRequest(
            messages=_messages(turns),
            documents=[gateway_pb2.Document(text=text) for text in documents],
            mode=mode,
            sampling=sampling,
        ),
        _turns(),
        _documents,
        _samplings(),
        st.sampled_from([common_pb2.REUSE_MODE_EXACT, common_pb2.REUSE_MODE_LINKED]),
    )


def render_chats() -> st.SearchStrategy[gateway_pb2.RenderChatRequest]:
    """For RenderChat."""
    return st.builds(
        lambda turns, documents: gateway_pb2.RenderChatRequest(
            messages=_messages(turns), documents=[gateway_pb2.Document(text=text) for text in documents]
        ),
        _turns(),
        _documents,
    )


def http_chats() -> st.SearchStrategy[dict[str, Any]]:
    """Bodies for /v1/chat/completions."""
    contents = st.booleans()

    def message(role: str, content: str, in_parts: bool) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}

    messages = st.builds(lambda turns, in_parts: [message(*turn, in_parts) for turn in turns], _turns(), contents)
    return st.fixed_dictionaries(
        {"messages": messages, "max_tokens": st.integers(1, MAX_TOKENS)},
        optional={
            "documents": _documents.map(lambda texts: [*texts[:1], *({"text": text} for text in texts[1:])]),
            "reuse": st.sampled_from(["exact", "linked"]),
            "temperature": st.sampled_from([0, 0.5, 1.0]),
            "top_p": st.sampled_from([0.1, 1]),
            "top_k": st.integers(0, 5),
            "seed": st.integers(-5, 5),
            "n": st.integers(1, 2),
            "stop": _texts | st.lists(_texts, max_size=2),
            "stream": st.booleans(),
            "logprobs": st.booleans(),
            "ignore_eos": st.booleans(),
            "user": _texts,
            "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        },
    )
