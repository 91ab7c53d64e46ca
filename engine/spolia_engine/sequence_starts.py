"""How sequences begin: one of a context, several samples of one context, branches of a sequence that decodes."""

from __future__ import annotations

from collections.abc import Sequence

from spolia_engine.context import Context, whole
from spolia_engine.generation import Generation
from spolia_engine.run import Run, copy_kv
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence import close_all


def start_sequence(context: Context, generation: Generation) -> DecodeSequence:
    """Makes a sequence of a context. Takes the context, also when it raises.

    Tokens a resumed answer has already are part of the context. Memory for the next one is taken now, for others as
    they come. Raises `Busy` when the pool has no room.
    """
    try:
        sequence = DecodeSequence(context, generation)
    except BaseException:
        context.close()
        raise
    try:
        sequence.make_room()
    except BaseException:
        sequence.close()
        raise
    return sequence


def start_samples(context: Context, generations: Sequence[Generation]) -> list[DecodeSequence]:
    """Makes a sequence of each generation, at least one, all of one context: its KV is held once.

    Takes the context, also when it raises: `Busy`, with nothing held, when the pool has no room for all.
    """
    started: list[DecodeSequence] = []
    try:
        for generation in generations[:-1]:
            started.append(start_sequence(context.shared(), generation))
    except BaseException:
        context.close()
        close_all(started)
        raise
    try:
        started.append(start_sequence(context, generations[-1]))
    except BaseException:
        close_all(started)
        raise
    return started


def branch(sequence: DecodeSequence, sample_indices: Sequence[int]) -> list[DecodeSequence]:
    """Goes on from where a sequence stands in more ways than one; `sequence` goes on too.

    The tail's KV is copied once, and every branch reads the copy; what any of them writes is its own. With that,
    prompts and answers branch into trees. Raises `Busy`, with nothing held, when the pool has no room.
    """
    tail, base = sequence.tail, sequence.context
    context = base.shared()
    if tail.length:
        try:
            extent = context.pool.allocate(tail.length)
        except BaseException:
            context.close()
            raise
        copy_kv([tail.span], extent, tail.rope_base, tail.rope_base + tail.length)
        run = Run(extent, 0, tail.length, tail.rope_base)
        context.spans.append(whole(run))
        context.extents.append(extent)
    context.live = None  # the sequence's own, who reads it in its slot
    return start_samples(context, [sequence.generation.branch(index) for index in sample_indices])
