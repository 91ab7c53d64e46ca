"""The baseline outside this system: transformers' own prefill, in this process, to the first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class TransformersPrefill:
    """A fresh model with its own attention (sdpa), float32, its own cache, and no server around it."""

    def __init__(self, model: Path, num_threads: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
        ).eval()
        self._num_threads = num_threads
        self.bos_token_id = int(self._model.config.bos_token_id)

    @torch.inference_mode()
    def ttft_ms(self, token_ids: Sequence[int]) -> float:
        """Milliseconds from token ids to the first token. Only the last row gets logits, as here."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            started = time.perf_counter()
            output = self._model(torch.tensor([list(token_ids)]), use_cache=True, logits_to_keep=1)
            int(output.logits[0, -1].argmax())
            return (time.perf_counter() - started) * 1e3
        finally:
            torch.set_num_threads(before)
