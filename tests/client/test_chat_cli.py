"""Laws of `spolia chat`: the conversation is the prompt, as the model's template writes it or as plain text."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli_runs import Done, Spolia
from fake_gateway import HELLO, FakeGateway, delta, finish

from spolia import Document, TokenIds, Unavailable
from spolia.cli.chat import _Talk
from spolia.cli.conversation import Conversation, PlainText, Template
from spolia.client import Client
from spolia.v1 import common_pb2

Chat = Callable[..., Done]

PLAIN = ("--assistant", "Answer:")
ASKED = "\nQuestion: {}\nAnswer:"


@pytest.fixture
def chat(spolia: Spolia, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Says lines, one after the other, from a pipe."""

    def said(*lines: str, options: Sequence[str] = ()) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return spolia("chat", *options)

    return said


def prompts(gateway: FakeGateway) -> list[list[object]]:
    """Of each request its parts, as text, ids or a document's text in a tuple."""
    return [
        [
            (part.document.text,) if part.HasField("document") else list(part.token_ids.ids) or part.text
            for part in request.parts
        ]
        for request in gateway.requests
    ]


def chats(gateway: FakeGateway) -> list[tuple[list[str], list[str]]]:
    """Of each request its documents, and its messages behind their roles."""
    return [
        (
            [document.text for document in request.documents],
            [f"{message.role}: {message.content}" for message in request.messages],
        )
        for request in gateway.requests
    ]


def test_the_models_template_writes_the_conversation(chat: Chat, page: Path, gateway: FakeGateway) -> None:
    done = chat("Hi", "And you?", options=("-d", str(page), "--system", "Read."))
    assert (done.code, done.out) == (0, "Héllo\nHéllo\n")
    begin = ["system: Read.", "user: Hi"]
    assert chats(gateway) == [
        (["A page."], begin),
        (["A page."], [*begin, "assistant: Héllo", "user: And you?"]),
    ]
    assert not any(request.parts or request.sampling.stop for request in gateway.requests), "the template has both"
    assert gateway.chats == [], "an answer takes one trip"
    assert "plain text" not in done.err


def test_a_model_without_a_template_gets_plain_text_and_that_is_said_once(chat: Chat, gateway: FakeGateway) -> None:
    gateway.has_template = False
    done = chat("Hi", "And you?")
    assert done.code == 0
    assert done.err.count("no chat template: plain text under labels instead") == 1
    assert prompts(gateway)[1:] == [
        [ASKED.format("Hi")],
        [ASKED.format("Hi"), [5, 6, 7, 8], ASKED.format("And you?")],
    ]
    assert [bool(request.messages) for request in gateway.requests] == [True, False, False]


def test_labels_ask_for_plain_text(chat: Chat, gateway: FakeGateway) -> None:
    assert chat("Hi", options=("--user", "Q:")).code == 0
    assert chat("Hi", options=("--plain",)).code == 0
    assert prompts(gateway) == [["\nQ: Hi\nAnswer:"], [ASKED.format("Hi")]]
    assert not any(request.messages for request in gateway.requests)


def test_in_plain_text_each_turn_stands_behind_all_before_it(chat: Chat, gateway: FakeGateway) -> None:
    done = chat("Hi", "", "And you?", options=PLAIN)
    assert (done.code, done.out) == (0, "Héllo\nHéllo\n")
    assert prompts(gateway) == [
        [ASKED.format("Hi")],
        [ASKED.format("Hi"), [5, 6, 7, 8], ASKED.format("And you?")],
    ]
    assert {tuple(request.sampling.stop) for request in gateway.requests} == {("\nQuestion:",)}
    assert {request.mode for request in gateway.requests} == {common_pb2.REUSE_MODE_EXACT}


def test_each_answer_says_what_it_reused_from_where(chat: Chat) -> None:
    done = chat("Hi")
    assert "4 tokens, first after" in done.err
    assert "112 of 140 prompt tokens reused (computed 12, link 16, device 72, host 40)" in done.err


def test_documents_stand_first_and_are_linked(chat: Chat, page: Path, tmp_path: Path, gateway: FakeGateway) -> None:
    other = tmp_path / "other.md"
    other.write_text("Another page.")
    options = (*PLAIN, "--document", str(page), "--system", "Read.")
    done = chat("Hi", f"/document {other}", "/documents", "And?", options=options)
    assert done.code == 0
    assert done.err.count(str(page)) == done.err.count(str(other)) == 1
    first, second = prompts(gateway)
    assert first == ["Read.", ("A page.",), ASKED.format("Hi")]
    assert second[:3] == ["Read.", ("A page.",), ("Another page.",)]
    assert {request.mode for request in gateway.requests} == {common_pb2.REUSE_MODE_LINKED}


def test_a_model_that_may_not_link_answers_exactly_and_that_is_said_once(
    chat: Chat, page: Path, gateway: FakeGateway
) -> None:
    gateway.may_link = False
    done = chat("Hi", "And you?", options=("-d", str(page)))
    assert (done.code, done.out) == (0, "Héllo\nHéllo\n")
    assert done.err.count("the profile forbids LINKED: exact instead") == 1
    linked, exact = common_pb2.REUSE_MODE_LINKED, common_pb2.REUSE_MODE_EXACT
    assert [request.mode for request in gateway.requests] == [linked, exact, exact]
    assert chat("Hi", options=("-d", str(page), "--mode", "linked")).code == 1, "who asks for it is refused"


def test_reset_forgets_the_turns_and_keeps_the_documents(chat: Chat, page: Path, gateway: FakeGateway) -> None:
    assert chat("Hi", "/reset", "Hi", options=("-d", str(page), "--mode", "exact")).code == 0
    first, second = chats(gateway)
    assert first == second == (["A page."], ["user: Hi"])
    assert {request.mode for request in gateway.requests} == {common_pb2.REUSE_MODE_EXACT}


def test_help_and_quit(chat: Chat, gateway: FakeGateway) -> None:
    done = chat("/help", "/quit", "Hi")
    assert (done.code, gateway.requests) == (0, [])
    assert all(word in done.err for word in ("/document", "/reset", "/help", "/quit"))


def test_a_pipe_ends_with_the_first_error(chat: Chat, gateway: FakeGateway) -> None:
    done = chat("/nonsense", "Hi")
    assert (done.code, gateway.requests) == (2, [])
    assert "/nonsense" in done.err
    gateway.failure = Unavailable("no decode node")
    assert chat("Hi", "Hi").code == 3
    assert len(gateway.requests) == 1


def test_an_answer_that_failed_or_was_cut_short_is_no_turn(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    conversation = Conversation([])
    with Client(gateway.address, timeout_s=10) as client:
        talk = _Talk(client, conversation, Template(), PlainText("Question:", "Answer:"), {}, None)
        gateway.script = [HELLO[0], Unavailable("the node died")]
        assert talk.take("Hi")
        assert "the node died" in capsys.readouterr().err
        gateway.script = list(HELLO)

        def interrupted(text: str) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "write", interrupted)
            patch.setattr("builtins.print", lambda *args, **options: None)
            assert talk.take("Hi")
        assert "not part of the conversation" in capsys.readouterr().err
        assert conversation.turns == []
        assert talk.take("Hi")
        assert len(conversation.turns) == 1


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (common_pb2.FINISH_REASON_LENGTH, TokenIds([5, 6, 7])),
        (common_pb2.FINISH_REASON_EOS, TokenIds([5, 6])),
        (common_pb2.FINISH_REASON_STOP, " Yes"),
    ],
)
def test_what_ended_an_answer_is_no_part_of_the_next_prompt(
    reason: common_pb2.FinishReason.ValueType, expected: object, gateway: FakeGateway
) -> None:
    ended = finish(3)
    ended.finish.reason = reason
    gateway.script = [delta(" Yes", [5, 6, 7], 0, 0), ended]
    conversation, plain = Conversation([Document("A page.")]), PlainText("Q:", "A:")
    with Client(gateway.address) as client:
        conversation.answered("Hi", client.generate(plain.prompt(conversation, "Hi").parts))
    parts = plain.prompt(conversation, "So?").parts
    assert parts == [Document("A page."), "\nQ: Hi\nA:", expected, "\nQ: So?\nA:"]


def test_a_document_that_cannot_be_read_is_named_before_anything_is_asked(
    chat: Chat,
    gateway: FakeGateway,
) -> None:
    done = chat("Hi", options=("--document", "/nowhere/at/all.md"))
    assert (done.code, gateway.requests) == (2, [])
    assert "/nowhere/at/all.md" in done.err
