"""The process in which transformers decodes as it comes: nothing of the engine or its kernels is imported.

`python -m spolia_bench.shared.transformers_worker`: messages come on standard input and go to standard output. It ends
when nobody is left to ask for turns.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from spolia_bench.shared.message_pipe import Begin, Message, MessagePipe, Ready, TakeTurn, Took
from spolia_core.errors import DeadlineExceeded, InternalError, Unavailable

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""What `spolia_kernels` sets in its process; torch as it comes has it off."""
PATIENCE_S = 600.0
"""For the next message: our own turns between two of this process take seconds."""


def main() -> int:
    """Serves one parent."""
    pipe = MessagePipe(sys.stdin.fileno(), os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
    try:
        serve(pipe)
    except Unavailable:
        return 0
    except (DeadlineExceeded, InternalError) as error:
        print(f"transformers worker: {error}", file=sys.stderr)
        return 1
    return 0


def serve(pipe: MessagePipe) -> None:
    """Takes turns as they are asked for, until the other end is gone: `Unavailable`.

    Raises `InternalError` for a message out of turn, and where torch would not be as it comes.
    """
    if HUGE_PAGES in os.environ:
        raise InternalError(f"{HUGE_PAGES} is set: this is not torch as it comes")
    first = work = _begun(pipe.receive(PATIENCE_S))
    # Torch reads its environment as it is imported, and it takes seconds: not before there is work.
    import torch

    from spolia_bench.shared.models import random_model, weights_digest
    from spolia_bench.shared.pairs import second_ms
    from spolia_bench.shared.transformers_decode import TransformersDecode

    torch.set_num_threads(work.threads)
    model: Any = random_model(work.model, work.seed)
    while True:
        if (work.model, work.seed, work.threads) != (first.model, first.seed, first.threads):
            raise InternalError(f"a process has one model, seed and number of threads: {first}, then {work}")
        step = TransformersDecode(model, work.num_rows, work.prefix_tokens).step()
        has_kernels = "spolia_kernels" in sys.modules or "spolia_engine" in sys.modules
        pipe.send(Ready(weights_digest(model), has_kernels))
        while isinstance(asked := pipe.receive(PATIENCE_S), TakeTurn):
            pipe.send(Took(second_ms(step)))
        work = _begun(asked)


def _begun(message: Message) -> Begin:
    if not isinstance(message, Begin):
        raise InternalError(f"{type(message).__name__} was not expected here")
    return message


if __name__ == "__main__":
    sys.exit(main())
