"""Which models the decode nodes serve, and which nodes serve one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spolia.v1 import directory_pb2 as pb
from spolia_core.errors import NotFound, NotSupported, Unavailable
from spolia_core.ids import IdSpace, Recipe, tenant_key
from spolia_core.link_terms import linked_forbidden
from spolia_core.profile import DEFAULT_PROFILE


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What nodes must agree on to work on one request: ids are derived from it."""

    name: str
    fingerprint: bytes
    compute_dtype: str
    num_sink_tokens: int = 0

    @classmethod
    def of(cls, node: pb.NodeRecord) -> ModelKey | None:
        """The key of the model a node serves; None when it serves none."""
        if not node.HasField("model"):
            return None
        served = node.model
        return cls(served.name, served.fingerprint, served.compute_dtype, served.num_sink_tokens)

    def id_space(self, cluster_secret: str, tenant_id: str, cache_salt: str = "") -> IdSpace:
        """The ids of one tenant's chunks under this model; those with another salt are others."""
        recipe = Recipe(self.compute_dtype, self.num_sink_tokens)
        return IdSpace(tenant_key(cluster_secret.encode(), tenant_id, cache_salt), self.fingerprint, recipe)

    def served_by(self, nodes: Iterable[pb.NodeRecord]) -> list[pb.NodeRecord]:
        """The nodes that serve exactly this."""
        return [node for node in nodes if ModelKey.of(node) == self]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the decode nodes that serve it allow: what any of them could not take, none is offered.

    `supports_linked`: some node's model can be served LINKED. `linked_refusal` says why none does so unasked; empty
    where some node does. `profile` and `policy` are those of most nodes, or of most that refuse where all refuse.
    """

    key: ModelKey
    max_context_tokens: int
    vocab_size: int
    supports_linked: bool
    num_nodes: int
    profile: str = DEFAULT_PROFILE
    policy: str = ""
    linked_refusal: str = ""

    def check_linked(self, *, force_linked: bool) -> None:
        """Raises `NotSupported` where LINKED cannot be served, or its profile forbids it and nobody forces it."""
        if not self.supports_linked:
            raise NotSupported(
                f"model {self.key.name!r} cannot be served LINKED: {self.linked_refusal or 'no node does'}; use EXACT",
                field="mode",
                limit="EXACT",
                actual="LINKED",
            )
        if self.linked_refusal and not force_linked:
            raise linked_forbidden(self.profile, self.linked_refusal)


def serves_linked(served: pb.ServedModel, *, force_linked: bool) -> bool:
    """Whether a node takes a LINKED request: its model can, and its profile does not forbid it or is overridden."""
    return served.supports_linked and (force_linked or not served.linked_refusal)


def models_of(decode_nodes: Sequence[pb.NodeRecord]) -> list[Model]:
    """Every model served, by name; of equal names (a roll-out under way) the one on more nodes first."""
    groups: defaultdict[ModelKey, list[pb.ServedModel]] = defaultdict(list)
    for node in decode_nodes:
        key = ModelKey.of(node)
        if key is not None:
            groups[key].append(node.model)
    models = [_model(key, served) for key, served in groups.items()]
    return sorted(models, key=_order)


class ServedModels:
    """`models_of`, made anew when the nodes are others: their records change once a second, and requests come often."""

    def __init__(self) -> None:
        self._nodes: Sequence[pb.NodeRecord] = ()
        self._models: Sequence[Model] = ()

    def of(self, decode_nodes: Sequence[pb.NodeRecord]) -> Sequence[Model]:
        """Every model served. Records are not changed, but replaced."""
        if [*map(id, decode_nodes)] != [*map(id, self._nodes)]:
            self._nodes, self._models = decode_nodes, models_of(decode_nodes)
        return self._models


def _order(model: Model) -> tuple[str, int, bytes, str, int]:
    key = model.key
    return key.name, -model.num_nodes, key.fingerprint, key.compute_dtype, key.num_sink_tokens


def _model(key: ModelKey, served: Sequence[pb.ServedModel]) -> Model:
    can = [model for model in served if model.supports_linked]
    allowed = [model for model in can if not model.linked_refusal]
    # What is said of LINKED is said by the nodes that decide it: any that serves it, else any that could.
    terms = Counter((m.profile or DEFAULT_PROFILE, m.policy, m.linked_refusal) for m in allowed or can or served)
    (profile, policy, refusal), _ = max(terms.items(), key=lambda item: (item[1], item[0]))
    return Model(
        key=key,
        max_context_tokens=min(model.max_context_tokens for model in served),
        vocab_size=min(model.vocab_size for model in served),
        supports_linked=bool(can),
        num_nodes=len(served),
        profile=profile,
        policy=policy,
        linked_refusal=refusal,
    )


def check_model_name(wanted: str, own: str) -> None:
    """Raises `NotFound` unless `wanted` is empty or the model `own` that this gateway tokenizes for."""
    if wanted and wanted != own:
        raise NotFound(
            f"this gateway has no model {wanted!r}; it serves {own!r}", field="model", limit=own, actual=wanted
        )


def choose_model(name: str, models: Sequence[Model]) -> Model:
    """Of `models_of`, that of this name which most nodes serve. Raises `Unavailable` when none does now."""
    for model in models:
        if model.key.name == name:
            return model
    others = ", ".join(repr(other) for other in sorted({model.key.name for model in models}))
    raise Unavailable(
        f"no decode node serves model {name!r} now; " + (f"those known serve {others}" if others else "none is known"),
        field="model",
        actual=name,
    )
