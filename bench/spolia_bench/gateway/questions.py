"""Questions nobody has asked, so that nothing of them is known anywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from spolia.v1.common_pb2 import SamplingParams
from spolia_bench.texts import text_of
from spolia_core.errors import NotFound
from spolia_core.tokenizer_files import TokenizerFiles
from spolia_gateway.chat_template import ChatTemplate
from spolia_gateway.tokenizer import Form, PartTokenizer

QUESTION_CHARS = 24
MAX_PROMPT_TOKENS = 32
"""What a decode node computes itself, as the engine alone does."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, as a chat's message, as the prompt the chat is, and as its token ids."""

    question: str
    prompt: str
    token_ids: tuple[int, ...]
    num_tokens: int

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, of one length."""
        return SamplingParams(max_tokens=self.num_tokens, ignore_eos=True, seed=0, num_samples=1)


class Questions:
    """Draws questions for a model."""

    def __init__(self, model: Path, num_tokens: int, seed: int) -> None:
        """Answers have `num_tokens`. Raises `NotFound` for a model without a chat template."""
        files = TokenizerFiles.read(model)
        template = ChatTemplate.read(model, files.tokenizer_config)
        if template is None:
            raise NotFound(f"{model} has no chat template", field="tokenizer", actual=str(model))
        self._template = template
        self._tokenizer = PartTokenizer(files, cache_bytes=0)
        self._rng = random.Random(seed)
        self._num_tokens = num_tokens

    def several(self, count: int) -> list[Asked]:
        """The next ones."""
        return [self.draw() for _ in range(count)]

    def draw(self) -> Asked:
        """The next one whose prompt is short enough."""
        while True:
            question = text_of(QUESTION_CHARS, self._rng)
            prompt = self._template.render([{"role": "user", "content": question}])
            ids = self._tokenizer.encode(prompt, Form.HEAD, tenant_id="bench")
            if len(ids) <= MAX_PROMPT_TOKENS:
                return Asked(question, prompt, ids, self._num_tokens)
