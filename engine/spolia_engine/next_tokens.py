"""From logits to an answer's next token: sampling, constraints, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_core.errors import InternalError
from spolia_engine.device_decoding import DrawnRow
from spolia_engine.generation import Delta, Generation
from spolia_engine.grammar import Matcher
from spolia_engine.logprobs import TokenLogprobs, logprobs_of
from spolia_engine.row_sampler import Draw, sample_rows
from spolia_engine.sampler import sample


def draw(generation: Generation, logits: Tensor) -> Delta:
    """Draws an answer's next token from `logits` [vocab_size] and adds it."""
    if generation.matcher is not None:
        return _draw_allowed(generation, logits, generation.matcher)
    params = generation.params
    token_id = sample(logits, params, len(generation.token_ids), generation.sample_index)
    told = params.num_top_logprobs
    return generation.accept(token_id, None if told is None else logprobs_of(logits, token_id, told))


def drawn_rows(generations: Sequence[Generation], logits: Tensor) -> list[Tensor | DrawnRow]:
    """For `accept_row`: the next token of each answer, drawn together from `logits` [num_rows, vocab_size], float32.

    A row that a constraint narrows stays as it is: it is drawn by itself.
    """
    rows = [row for row, generation in enumerate(generations) if generation.matcher is None]
    found: list[Tensor | DrawnRow] = list(logits)
    if not rows:
        return found
    some = [generations[row] for row in rows]
    among = logits if len(rows) == len(generations) else logits[torch.tensor(rows, device=logits.device)]
    tokens = sample_rows(among, [Draw(each.params, len(each.token_ids), each.sample_index) for each in some])
    for row, token_id, generation in zip(rows, tokens, some, strict=True):
        told = generation.params.num_top_logprobs
        logprob = logprobs_of(logits[row], token_id, 0).logprob if told == 0 and token_id >= 0 else math.nan
        found[row] = DrawnRow(token_id, logprob, logits[row])
    return found


def accept_row(generation: Generation, row: Tensor | DrawnRow) -> Delta:
    """Adds an answer's next token: what was drawn with other rows', else by `draw`.

    What a device does not know is drawn here, from its logits: what a constraint allows.
    """
    if not isinstance(row, DrawnRow):
        return draw(generation, row)
    if row.token_id < 0:
        raise InternalError("the model's logits are not numbers: its weights or its KV are broken")
    if generation.matcher is not None:
        return draw(generation, row.logits.float())
    told = generation.params.num_top_logprobs
    if told is None:
        return generation.accept(row.token_id)
    found = logprobs_of(row.logits.float(), row.token_id, told) if told else TokenLogprobs(row.logprob, ())
    return generation.accept(row.token_id, found)


def _draw_allowed(generation: Generation, logits: Tensor, matcher: Matcher) -> Delta:
    """`draw` among the tokens that the matcher allows, as if the model had no others."""
    allowed = torch.from_numpy(matcher.allowed()).to(logits.device)
    among, params = logits.index_select(0, allowed), generation.params
    index = sample(among, params, len(generation.token_ids), generation.sample_index)
    told = params.num_top_logprobs
    logprobs = None if told is None else logprobs_of(among, index, told).of(allowed)
    return generation.accept(int(allowed[index]), logprobs)
