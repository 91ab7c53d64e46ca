"""`spolia chat`: a conversation, about documents or without."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.conversation import Conversation, PlainText, Template, Writing
from spolia.cli.generate import ModeName
from spolia.cli.options import DEFAULT_ADDRESS, Address, Model
from spolia.cli.output import notes, print_error
from spolia.cli.texts import read_document
from spolia.cli.units import counted, human_ms
from spolia.client import Client
from spolia.errors import InvalidRequest, NotSupported, SpoliaError
from spolia.options import GenerateOptions
from spolia.parts import Document
from spolia.results import Result

HELP = """/document FILE  talk about this file too
/documents      which files there are
/reset          forget the conversation; the documents stay
/help           this
/quit           end, as Ctrl-D does; Ctrl-C ends an answer"""
PROMPT = "> "
LINKED_REFUSED = ("mode", "profile")
"""Fields that a refusal of LINKED names: the model cannot, its profile forbids it."""
USER_LABEL, ASSISTANT_LABEL = "Question:", "Answer:"


def chat(
    document: Annotated[
        list[Path] | None, typer.Option("--document", "-d", help="File to talk about; its KV is reused.")
    ] = None,
    mode: Annotated[
        ModeName | None,
        typer.Option(
            help="linked reuses documents at any position; approximate. Default: linked with documents, where the "
            "model may."
        ),
    ] = None,
    system: Annotated[str, typer.Option(help="Text before everything else.")] = "",
    as_plain: Annotated[
        bool, typer.Option("--plain", help="Plain text under labels, not the model's chat template.")
    ] = False,
    user_label: Annotated[
        str | None, typer.Option("--user", help="What stands before a question; asks for plain text.")
    ] = None,
    assistant_label: Annotated[
        str | None, typer.Option("--assistant", help="What stands before an answer; asks for plain text.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; default: the gateway draws one.")] = None,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option("--timeout", help="Most seconds to wait for an answer.")] = 120.0,
) -> None:
    """Talk with a model: a line, an answer, and what it reused of documents and of the conversation so far.

    The conversation is written with the model's own chat template. Where it has none that is said, and questions and
    answers are plain text under labels, as they are with --plain, --user or --assistant. Lines that begin with / are
    commands; /help lists them. Lines may come from a pipe; then the first error ends it.
    """
    documents = [Document(read_document(path), name=str(path)) for path in document or []]
    conversation = Conversation(documents, system)
    plain = PlainText(user_label or USER_LABEL, assistant_label or ASSISTANT_LABEL)
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    with Client(address, timeout_s=timeout, retry_s=0, model=model) as client:
        writing = plain if as_plain or user_label is not None or assistant_label is not None else Template()
        talk = _Talk(client, conversation, writing, plain, options, mode)
        for line in _lines(is_asked=talk.is_asked):
            if not talk.take(line):
                return


class _Talk:
    """The conversation, and the commands that change it."""

    def __init__(
        self,
        client: Client,
        conversation: Conversation,
        writing: Writing,
        plain: PlainText,
        options: GenerateOptions,
        mode: ModeName | None,
    ) -> None:
        """`plain` is used from the first question on where the model does not know `writing`."""
        self._client = client
        self._conversation = conversation
        self._writing = writing
        self._plain = plain
        self._options = options
        self._mode = mode
        self.is_asked = sys.stdin.isatty()
        """Whether somebody sits there."""

    def take(self, line: str) -> bool:
        """Does what a line says; False when it says to end. Raises `SpoliaError` where nobody is there to be told."""
        command, _, argument = line.partition(" ")
        try:
            match command:
                case "":
                    pass
                case "/quit" | "/exit":
                    return False
                case "/help":
                    notes().print(HELP, markup=False)
                case "/reset":
                    self._conversation.reset()
                    notes().print("forgotten", style="dim")
                case "/documents":
                    names = [each.name for each in self._conversation.documents]
                    notes().print("\n".join(names) or "none", markup=False)
                case "/document":
                    path = Path(argument.strip())
                    self._conversation.documents.append(Document(read_document(path), name=str(path)))
                case _ if command.startswith("/"):
                    raise InvalidRequest(f"there is no command {command}; /help lists them", field="command")
                case _:
                    self._ask(line)
        except SpoliaError as error:
            if not self.is_asked:
                raise
            print_error(error)
        return True

    def _ask(self, question: str) -> None:
        result = self._answer_as_served(question)
        if result is None:
            notes().print("cut short, and not part of the conversation", style="dim")
            return
        self._conversation.answered(question, result)
        notes().print(reused(result), style="dim", markup=False)

    def _answer_as_served(self, question: str) -> Result | None:
        """`_answer`, in another way where the model does not serve one that nobody asked for."""
        while True:
            try:
                return self._answer(question)
            except NotSupported as error:
                if error.field == "messages" and self._writing is not self._plain:
                    self._writing, instead = self._plain, "plain text under labels instead"
                elif error.field in LINKED_REFUSED and self._mode is None:
                    self._mode, instead = ModeName.EXACT, "exact instead, which reuses a beginning that repeats"
                else:
                    raise
                notes().print(f"{error.message}: {instead}", style="dim", markup=False)

    def _answer(self, question: str) -> Result | None:
        """Prints an answer as it comes; None when it was interrupted."""
        default = ModeName.LINKED if self._conversation.documents else ModeName.EXACT
        options: GenerateOptions = {**self._options, "mode": (self._mode or default).value}
        with self._writing.ask(self._client, self._conversation, question, options) as answer:
            try:
                for delta in answer:
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
            except KeyboardInterrupt:  # of this answer only; leaving the block ends it on every node
                print("\n", flush=True)
                return None
            print(flush=True)
            return answer.result()


def reused(result: Result) -> str:
    """Where an answer's prompt came from, in a line."""
    sources = ", ".join(
        f"{source.name.lower()} {count:,}" for source, count in sorted(result.reuse.sources.items()) if count
    )
    return (
        f"{counted(result.num_generated_tokens, 'token')}, first after {human_ms(result.ttft_ms)}; "
        f"{result.reuse.num_reused_tokens:,} of {counted(result.num_prompt_tokens, 'prompt token')} reused ({sources})"
    )


def _lines(*, is_asked: bool) -> Iterator[str]:
    """What is typed, or comes from a pipe, line by line."""
    if not is_asked:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and history, where there is one
    notes().print("/help lists the commands; Ctrl-D ends", style="dim")
    while True:
        try:
            yield input(PROMPT).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
