"""Which models the decode nodes serve, and which nodes serve one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spolia.v1 import directory_pb2 as pb
from spolia_core.errors import NotFound, Unavailable
from spolia_core.ids import IdSpace, Recipe, tenant_key


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What nodes must agree on to work on one request: ids are derived from it."""

    name: str
    fingerprint: bytes
    compute_dtype: str

    @classmethod
    def of(cls, node: pb.NodeRecord) -> ModelKey | None:
        """The key of the model a node serves; None when it serves none."""
        if not node.HasField("model"):
            return None
        return cls(node.model.name, node.model.fingerprint, node.model.compute_dtype)

    def id_space(self, cluster_secret: str, tenant_id: str) -> IdSpace:
        """The ids of one tenant's chunks under this model."""
        return IdSpace(
            tenant_key(cluster_secret.encode(), tenant_id), self.fingerprint, Recipe(compute_dtype=self.compute_dtype)
        )

    def served_by(self, nodes: Iterable[pb.NodeRecord]) -> list[pb.NodeRecord]:
        """The nodes that serve exactly this."""
        return [node for node in nodes if ModelKey.of(node) == self]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the decode nodes that serve it allow: what any of them could not take, none is offered."""

    key: ModelKey
    max_context_tokens: int
    vocab_size: int
    supports_linked: bool
    num_nodes: int


def models_of(decode_nodes: Sequence[pb.NodeRecord]) -> list[Model]:
    """Every model served, by name; of equal names (a roll-out under way) the one on more nodes first."""
    groups: defaultdict[ModelKey, list[pb.ServedModel]] = defaultdict(list)
    for node in decode_nodes:
        key = ModelKey.of(node)
        if key is not None:
            groups[key].append(node.model)
    models = [_model(key, served) for key, served in groups.items()]
    return sorted(models, key=lambda m: (m.key.name, -m.num_nodes, m.key.fingerprint, m.key.compute_dtype))


def _model(key: ModelKey, served: Sequence[pb.ServedModel]) -> Model:
    return Model(
        key=key,
        max_context_tokens=min(model.max_context_tokens for model in served),
        vocab_size=min(model.vocab_size for model in served),
        supports_linked=any(model.supports_linked for model in served),
        num_nodes=len(served),
    )


def check_model_name(wanted: str, own: str) -> None:
    """Raises `NotFound` unless `wanted` is empty or the model `own` that this gateway tokenizes for."""
    if wanted and wanted != own:
        raise NotFound(
            f"this gateway has no model {wanted!r}; it serves {own!r}", field="model", limit=own, actual=wanted
        )


def choose_model(name: str, decode_nodes: Sequence[pb.NodeRecord]) -> Model:
    """The model of this name that most decode nodes serve. Raises `Unavailable` when none does now."""
    models = models_of(decode_nodes)
    for model in models:
        if model.key.name == name:
            return model
    others = ", ".join(repr(other) for other in sorted({model.key.name for model in models}))
    raise Unavailable(
        f"no decode node serves model {name!r} now; " + (f"those known serve {others}" if others else "none is known"),
        field="model",
        actual=name,
    )
