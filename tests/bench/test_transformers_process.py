"""The baseline's process: what is said to it, when it ends, and that it is transformers as it comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spolia_bench.shared.message_pipe import Begin, Message, MessagePipe, Ready, TakeTurn, Took, decoded, encoded
from spolia_bench.shared.models import random_model, weights_digest
from spolia_bench.shared.pairs import measured_by_turns, second_ms
from spolia_bench.shared.transformers_decode import TransformersDecode
from spolia_bench.shared.transformers_process import TransformersProcess
from spolia_core.errors import DeadlineExceeded, InternalError, Unavailable

WORK = Begin("llama-tiny", 3, num_rows=2, prefix_tokens=5, threads=1)
PARENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-m", "spolia_bench.shared.transformers_worker"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(worker.pid, flush=True)
time.sleep(60)
"""


@contextmanager
def pipes() -> Iterator[tuple[MessagePipe, MessagePipe, list[int]]]:
    """Two ends, and the descriptors of the second."""
    there, here = os.pipe(), os.pipe()
    open_fds = {*there, *here}
    theirs = [there[0], here[1]]
    try:
        yield MessagePipe(here[0], there[1]), MessagePipe(*theirs), theirs
    finally:
        for fd in open_fds:
            try:
                os.close(fd)
            except OSError:
                assert fd in theirs  # the test has closed it


@pytest.mark.parametrize("message", [WORK, Ready("ab", False), TakeTurn(), Took(1.5)])
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decoded(encoded(message)) == message
    with pipes() as (one, other, _):
        one.send(message)
        one.send(message)
        assert [other.receive(1.0), other.receive(1.0)] == [message, message]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\x80\x04", "no JSON"),
        (b"[1]", "kind"),
        (b'{"kind": "Leave"}', "kind"),
        (b'{"kind": "Took"}', "Took has {'ms': 'float'}"),
        (b'{"kind": "Took", "ms": "1"}', "'ms': 'str'"),
        (b'{"kind": "TakeTurn", "of": 1}', "'of': 'int'"),
    ],
)
def test_what_is_no_message_is_refused_by_name(line: bytes, said: str) -> None:
    with pytest.raises(InternalError, match=re.escape(said)):
        decoded(line)


def test_a_wait_ends_with_its_deadline_or_with_the_other_end() -> None:
    with pipes() as (one, _, theirs):
        os.write(theirs[1], b'{"kind": "Took",')  # half a message is none
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            one.receive(0.2)
        assert 0.2 <= time.monotonic() - began < 5.0
        os.write(theirs[1], b"x" * 8192)
        with pytest.raises(InternalError, match="4096 bytes"):
            one.receive(1.0)
        for fd in theirs:
            os.close(fd)
        with pytest.raises(Unavailable):
            MessagePipe(one._read_fd, one._write_fd).receive(1.0)
        with pytest.raises(Unavailable):
            one.send(TakeTurn())


def test_the_process_is_transformers_as_it_comes_and_waits_have_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as our kernels do where they are imported
    with TransformersProcess(WORK) as process:
        assert process.weights == weights_digest(random_model(WORK.model, WORK.seed))
        assert process.weights != weights_digest(random_model(WORK.model, WORK.seed + 1))
        turns = {"theirs": process.turn_ms, "ours": lambda: second_ms(lambda: None)}
        times = measured_by_turns(turns, 3)
        assert all(0.1 < ms < 5000.0 for ms in times["theirs"])
        process.begin(replace(WORK, num_rows=1, prefix_tokens=7))  # other rows of the same model
        assert process.weights == weights_digest(random_model(WORK.model, WORK.seed))
        assert 0.1 < process.turn_ms() < 5000.0
        before_s = process.cpu_s()
        process.turn_ms()
        assert process.cpu_s() > before_s > 0.0
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            process.turn_ms(0.2)
        os.kill(process.pid, signal.SIGCONT)
        process._pipe.receive(60.0)  # the turn that was late
        with pytest.raises(Unavailable):  # it says why and ends
            process.begin(replace(WORK, seed=WORK.seed + 1))
        pid = process.pid
    assert not Path(f"/proc/{pid}").exists()
    monkeypatch.setattr("spolia_bench.shared.transformers_process.NOT_INHERITED", ())
    with pytest.raises(Unavailable), TransformersProcess(WORK):  # it looks before it loads torch
        pass


def test_the_process_ends_with_the_one_that_asked_for_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(60.0, parent.kill)
    alarm.start()
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
    finally:
        alarm.cancel()
        parent.kill()
        parent.wait(10.0)
    give_up = time.monotonic() + 60.0
    while _runs(pid):
        assert time.monotonic() < give_up, "it went on alone"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@torch.inference_mode()
def test_each_of_transformers_steps_reads_what_those_before_it_wrote() -> None:
    decode = TransformersDecode(random_model(WORK.model, WORK.seed), WORK.num_rows, WORK.prefix_tokens)
    step = decode.step()
    first, second = step(), step()
    assert decode._cache.get_seq_length() == WORK.prefix_tokens + 2
    assert not torch.equal(first, second)  # type: ignore[arg-type]  # both are there by now
