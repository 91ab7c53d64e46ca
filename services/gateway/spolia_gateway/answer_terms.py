"""On what terms an answer is LINKED: those of the nodes that gave it, which may differ where one died.

A replay keeps the terms where a node has them. Where none does, the answer goes on under others, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import common_pb2, directory_pb2
from spolia_core.profile import DEFAULT_PROFILE, LinkPolicy

MIXED_PROFILE = "mixed"
"""`ReuseReport.profile` of an answer whose nodes served LINKED on different terms; its `nodes` say which took part."""


@dataclass(frozen=True, slots=True)
class NodeTerms:
    """The profile and the policy ("link:16") that a node published; a release that knows none serves the default."""

    profile: str
    policy: str

    @classmethod
    def of(cls, node: directory_pb2.NodeRecord) -> NodeTerms:
        """Those of a decode node."""
        return cls(node.model.profile or DEFAULT_PROFILE, node.model.policy or LinkPolicy().name)


class AnswerTerms:
    """The terms of one LINKED answer, node by node."""

    def __init__(self) -> None:
        self._nodes: list[directory_pb2.NodeRecord] = []

    def take(self, node: directory_pb2.NodeRecord) -> None:
        """A node said something of the answer; `node` is its record when it was called."""
        if not self._nodes or self._nodes[-1] is not node:
            self._nodes.append(node)

    @property
    def are_mixed(self) -> bool:
        """Whether nodes of different terms gave the answer."""
        return len({NodeTerms.of(node) for node in self._nodes}) > 1

    def preferred(self, nodes: Sequence[directory_pb2.NodeRecord]) -> Sequence[directory_pb2.NodeRecord]:
        """Those that would go on as the answer was begun; all of them where none would, or nothing was said yet."""
        if not self._nodes:
            return nodes
        terms = NodeTerms.of(self._nodes[0])
        return [node for node in nodes if NodeTerms.of(node) == terms] or nodes

    def sign(self, report: common_pb2.ReuseReport, *, force_linked: bool) -> None:
        """Has the last node's report speak for all that gave the answer."""
        if self.are_mixed:
            report.profile = MIXED_PROFILE
        report.forced |= force_linked and any(node.model.linked_refusal for node in self._nodes)
