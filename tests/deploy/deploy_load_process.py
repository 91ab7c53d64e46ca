"""A user's load, as a process of its own: SDK and HTTP, streams of every length, each answer compared and timed.

    python deploy_load_process.py GRPC_ADDRESS HTTP_URL CREDENTIALS MODEL

CREDENTIALS is a folder with `ca.crt` and `api.key`. Asks every prompt once, alone, and says so; then reads words from
standard input, as often as they come: `begin` starts the load, `end` ends it, and what came of each request is written
as a line of JSON. Times are the monotonic clock's, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import openai

from spolia import Client, Document, SpoliaError
from spolia.cli.demo_texts import load_samples

DEADLINE_S = 60.0
MARGIN = 1e-2
"""Where the two likeliest tokens lie closer, another batch may choose the other: comparing ends there."""

PAUSE_S = 0.05
NUM_EXACT, NUM_LINKED, NUM_HTTP = 2, 1, 1
SHORT_TOKENS, LONG_TOKENS = 16, 400
HTTP_RETRIES = 10
UNTYPED = "UNTYPED"
"""What an error begins with that is none of the clients' own."""


@dataclass
class Record:
    """What came of one request. Seconds; `longest_gap_s` between two messages of a stream, which began at `gap_at`."""

    kind: str
    began: float
    ended: float = 0.0
    error: str = ""
    is_equal: bool | None = None
    first_s: float = 0.0
    longest_gap_s: float = 0.0
    gap_at: float = 0.0
    num_tokens: int = 0
    deadline_s: float = DEADLINE_S


@dataclass
class Timing:
    """Notes when messages come."""

    record: Record
    last: float = field(default_factory=time.monotonic)
    num_messages: int = 0

    def came(self) -> None:
        now = time.monotonic()
        if not self.num_messages:
            self.record.first_s = now - self.record.began
        elif now - self.last > self.record.longest_gap_s:
            self.record.longest_gap_s, self.record.gap_at = now - self.last, self.last
        self.num_messages += 1
        self.last = now


@dataclass(frozen=True)
class Asked:
    """A prompt, and the tokens of its answer that are sure; `text` where all of them are."""

    parts: list[str | Document]
    max_tokens: int
    sure_ids: tuple[int, ...]
    text: str | None


class Load:
    """Asks in a closed loop, each worker in its own thread, until told to end."""

    def __init__(self, address: str, url: str, credentials: Path, model: Path) -> None:
        key, ca_file = (credentials / "api.key").read_text().strip(), credentials / "ca.crt"
        self._client = Client(address, timeout_s=DEADLINE_S, retry_s=DEADLINE_S, api_key=key, ca_file=ca_file)
        http = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(ca_file)))
        self._openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=HTTP_RETRIES, timeout=DEADLINE_S, http_client=http
        )
        samples = load_samples(model)
        self._documents = [document.text for document in samples.documents]
        self._questions = [question.text for question in samples.questions]
        self._model = self._client.models()[0].name
        self._ended = threading.Event()
        self._records: list[Record] = []
        self._threads: list[threading.Thread] = []

    def ask_alone(self) -> None:
        """Every prompt whose answer is compared later, with nobody else there."""
        turns = [self._documents[n:] + self._documents[:n] for n in range(3)]
        prompts = [[*turn[:6], question] for turn, question in zip(turns, self._questions, strict=False)]
        self._exact = [self._reference([Document(text) for text in p[:-1]] + [p[-1]], SHORT_TOKENS) for p in prompts]
        self._long = [self._reference([f"{question} "], LONG_TOKENS) for question in self._questions[:2]]
        self._http = [self._reference(["".join(p)], SHORT_TOKENS) for p in prompts]

    def begin(self, num_long: int) -> None:
        """Starts the workers, so many of them for long streams."""
        self._records, self._ended = [], threading.Event()
        workers = [(self._ask_exact, NUM_EXACT), (self._ask_linked, NUM_LINKED), (self._ask_long, num_long)]
        workers += [(self._ask_http, NUM_HTTP)]
        self._threads = [
            threading.Thread(target=self._work, args=(work, number))
            for work, count in workers
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Record]:
        """Lets requests under way finish; what came of all."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return self._records

    def _work(self, ask: Callable[[int], Record], first: int) -> None:
        for number in itertools.count(first):
            if self._ended.wait(PAUSE_S):
                return
            self._records.append(ask(number))

    def _reference(self, parts: list[str | Document], max_tokens: int) -> Asked:
        answer = self._client.generate(parts, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
        margins = [told.top[0][1] - told.top[1][1] for told in answer.logprobs]
        num_sure = next((index for index, margin in enumerate(margins) if margin < MARGIN), len(margins))
        text = answer.text if num_sure == len(margins) else None
        return Asked(parts, max_tokens, tuple(answer.token_ids[:num_sure]), text)

    def _ask_exact(self, number: int) -> Record:
        return self._ask_sdk("exact", self._exact[number % len(self._exact)])

    def _ask_long(self, number: int) -> Record:
        return self._ask_sdk("long", self._long[number % len(self._long)])

    def _ask_linked(self, number: int) -> Record:
        """Documents that nobody has seen, so that prefill nodes and stores have work too."""
        at = number % len(self._documents)
        parts: list[str | Document] = [Document(f"Letter {time.monotonic_ns()}. {self._documents[at]}")]
        parts += [Document(text) for text in self._documents[:3]]
        return self._ask_sdk("linked", Asked([*parts, self._questions[0]], SHORT_TOKENS, (), None), mode="linked")

    def _ask_sdk(self, kind: str, asked: Asked, mode: str = "exact") -> Record:
        record = Record(kind, time.monotonic())
        timing, received = Timing(record), []
        try:
            with self._client.stream(asked.parts, mode=mode, max_tokens=asked.max_tokens, ignore_eos=True) as stream:
                for delta in stream:
                    timing.came()
                    received += delta.token_ids
                stream.result()
            if asked.sure_ids:
                record.is_equal = tuple(received[: len(asked.sure_ids)]) == asked.sure_ids
        except SpoliaError as error:
            record.error = f"{type(error).__name__}: {error}"
        except Exception as error:
            record.error = f"{UNTYPED} {error!r}"
        record.num_tokens, record.ended = len(received), time.monotonic()
        return record

    def _ask_http(self, number: int) -> Record:
        asked = self._http[number % len(self._http)]
        record = Record("http", time.monotonic())
        timing, pieces = Timing(record), []
        try:
            for chunk in self._streamed(asked):
                timing.came()
                pieces.append(chunk)
            if asked.text is not None:
                record.is_equal = "".join(pieces) == asked.text
        except openai.OpenAIError as error:
            record.error = f"{type(error).__name__}: {error}"
        except Exception as error:
            record.error = f"{UNTYPED} {error!r}"
        record.num_tokens, record.ended = len(pieces), time.monotonic()
        return record

    def _streamed(self, asked: Asked) -> Iterator[str]:
        stream = self._openai.completions.create(
            model=self._model,
            prompt="".join(map(str, asked.parts)),
            max_tokens=asked.max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            for chunk in stream:
                yield chunk.choices[0].text if chunk.choices else ""


def main() -> None:
    """Obeys the words on standard input."""
    address, url, credentials, model = sys.argv[1:]
    load = Load(address, url, Path(credentials), Path(model))
    load.ask_alone()
    print("asked", flush=True)
    for line in sys.stdin:
        word, *told = line.split()
        if word == "begin":
            load.begin(int(*told))
        else:
            print(json.dumps([asdict(record) for record in load.end()]), flush=True)


if __name__ == "__main__":
    main()
