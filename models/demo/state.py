"""A run in the making: what it holds, how it is kept on disk and resumed, and how it becomes a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .lookup import prepare_lookup
from .network import Network, Shape, to_transformers
from .tokenizer import save_tokenizer, special_ids

_STATE = "state.pt"
_TOKENIZER = "tokenizer.json"


@dataclass(slots=True)
class Progress:
    """Where a run stands. `accuracy`, and `by_task` of it, is the running share of answers that are wholly right."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    trained_s: float = 0.0
    tokens: int = 0
    accuracy: float = 0.0
    prose_loss: float = float("nan")
    by_task: dict[str, float] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """A network with its optimizer, tokenizer and progress, and the folder that remembers them."""

    folder: Path
    seed: int
    network: Network
    optimizer: torch.optim.AdamW
    tokenizer: Tokenizer
    progress: Progress

    def save(self) -> None:
        """Writes everything a later call needs to go on, replacing the file at once."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "shape": asdict(self.network.shape),
            "rng": torch.get_rng_state(),
            "seed": self.seed,
        }
        partial = self.folder / "state.partial"
        torch.save(state, partial)
        partial.replace(self.folder / _STATE)

    def write_checkpoint(self, folder: Path) -> None:
        """Writes the model and its tokenizer in Hugging Face format."""
        model = to_transformers(self.network, *special_ids(self.tokenizer))
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder, self.network.shape.max_positions)


def open_run(folder: Path, tokenizer: Tokenizer, shape: Shape, seed: int) -> Run:
    """Resumes the run kept in `folder`, or starts one of the given shape and seed there."""
    path = folder / _STATE
    saved: dict[str, Any] | None = torch.load(path, weights_only=True) if path.exists() else None
    torch.manual_seed(seed)
    network = Network(Shape(**saved["shape"]) if saved else shape)
    run = Run(folder, seed, network, make_optimizer(network), tokenizer, Progress())
    if saved is None:
        prepare_lookup(network)
        return run
    network.load_state_dict(saved["network"])
    run.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    run.progress, run.seed = Progress(**saved["progress"]), saved["seed"]
    return run


def tokenizer_path(folder: Path) -> Path:
    """Where a run keeps its tokenizer."""
    return folder / _TOKENIZER


def make_optimizer(network: Network) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; the rate is set at every step."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=True)
