"""A tokenizer of one id per word, and small files of every layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from spolia_core.tokenizer_files import TokenizerFiles
from spolia_fidelity.encoder import TextEncoder

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Data files beside the repository; tests that read them are skipped where they are not."""


def word_encoder(*, bos: bool = True) -> TextEncoder:
    """Words (runs without white space), each one id; white space is nothing. Ids are those of `WORDS`, else unknown."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for number in range(3000):
        vocab[f"w{number}"] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = {"add_bos_token": bos, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    return TextEncoder(TokenizerFiles(json.loads(tokenizer.to_str()), config))


def words(num: int, start: int = 0) -> str:
    """`num` known words, all different up to 3,000."""
    return " ".join(f"w{(start + i) % 3000}" for i in range(num))


def write(path: Path, content: str | Sequence[Any]) -> Path:
    """Text as it is; objects as a JSON list or as JSON lines, by the name. Packed where the name says so."""
    if not isinstance(content, str):
        lines = [json.dumps(item) for item in content]
        content = "\n".join(lines) if ".jsonl" in path.name else f"[{','.join(lines)}]"
    raw = content.encode("utf-8")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def musique_record(index: int, num_passages: int = 3, size: int = 20) -> dict[str, Any]:
    ctxs = [{"title": "", "text": words(size, start=index * 100 + i * size)} for i in range(num_passages)]
    return {"ctxs": ctxs, "question": f"w{index} w7", "answers": ["w1 w2", "w3"]}


def nq_record(index: int) -> dict[str, Any]:
    ctx = {"title": f"w{index}", "text": words(10, start=index * 10), "hasanswer": True, "isgold": True}
    return {"question": f"w{index} w9", "answers": [f"w{index}"], "ctxs": [ctx], "nq_annotated_gold": {}}


def hotpot_record(index: int) -> dict[str, Any]:
    context = [[f"w{index}", [words(5, start=i), " " + words(5, start=i + 50)]] for i in range(4)]
    return {"_id": str(index), "question": "w1 w2", "answer": "w3", "supporting_facts": [], "context": context}


def kv_record(index: int) -> dict[str, Any]:
    pairs = [[f"k{i}", f"v{i}"] for i in range(7)]
    return {"ordered_kv_records": pairs, "key": f"k{index}", "value": f"w{index}"}


BABI = """1 w1 w2.
2 w3 w4.
3 Where is w1? \tw9\t1
4 w5 w6.
5 Where is w5?\tw10\t4
6 Is w3 there?\tw11\t2
1 w7 w8.
2 w1 w1.
3 w2 w2.
4 w3 w3.
5 Who?\tw4,w5\t1 2
"""
