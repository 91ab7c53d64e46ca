"""Synthetic tasks on which a loss from reuse shows: generated texts, cut into parts, with questions on them."""

from spolia_fidelity.tasks.corpus import TASKS, Corpus, Question, make_corpus
from spolia_fidelity.tasks.style import PLAIN_STYLE, Style

__all__ = ["PLAIN_STYLE", "TASKS", "Corpus", "Question", "Style", "make_corpus"]
