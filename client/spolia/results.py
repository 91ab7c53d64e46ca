"""What answers are made of. All of it is frozen: an answer does not change once given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from spolia.store_results import TierStats
from spolia_core.reuse import FinishReason, Miss, ReuseMode, ReuseReport, SourceRun, TokenSource


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly generated tokens and newly final text.

    Ids run ahead of text while text is held back for a stop string or an unfinished character, so either may be empty.
    `token_index` is the index of `token_ids[0]` among the generated tokens of sample `sample_index`. `logprobs` has one
    entry for each id where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    sample_index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: natural logarithms of the model's probabilities, before temperature, top-k and top-p.

    `logprob` is that of the token; `top` has (token id, log-probability) of the likeliest in its place.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the answers to a prompt. `token_ids` are every generated id, the end-of-sequence token included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Transfer:
    """KV bytes moved for a request on one data plane ("grpc" or "nixl").

    `chunk_bytes` came from stores, `live_bytes` were handed off by prefill, `inline_bytes` are chunks that had to
    travel inside that hand-off because no store could carry them.
    """

    plane: str
    chunk_bytes: int
    live_bytes: int
    inline_bytes: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a request reused and what it did not.

    `sources` counts prompt tokens by where their KV came from; the counts add up to the prompt's length, absent
    sources are zero. `runs` are the same tokens in the prompt's order, empty where a node of an older release answered.
    `misses` names every chunk that was wanted and not had, and why. `nodes` are the ids of the nodes that took part, in
    order. `profile` names the model's calibration that chose `link_tokens_per_chunk` and
    `sink_tokens_per_chunk`: "default" where the model has none, "manual" where an operator set them by hand. `forced`
    says that the answer is LINKED although the profile forbids it.
    """

    mode: ReuseMode
    sources: Mapping[TokenSource, int]
    misses: tuple[Miss, ...]
    transfers: tuple[Transfer, ...]
    profile: str
    link_tokens_per_chunk: int
    nodes: tuple[str, ...]
    forced: bool = False
    sink_tokens_per_chunk: int = 0
    runs: tuple[SourceRun, ...] = ()

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens whose KV did not have to be computed for this request."""
        return ReuseReport(self.mode, sources=Counter(self.sources)).num_reused_tokens

    @property
    def num_link_tokens(self) -> int:
        """Prompt tokens recomputed in place at the head of reused chunks."""
        return self.sources.get(TokenSource.LINK, 0)

    @property
    def bytes_moved(self) -> int:
        """KV bytes that crossed a network for this request, over all planes."""
        return sum(t.chunk_bytes + t.live_bytes + t.inline_bytes for t in self.transfers)


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer.

    `samples` are all answers that were asked for (`n`); `text`, `token_ids` and `finish_reason` are those of the first,
    `num_generated_tokens` counts the tokens of all. `ttft_ms` and `e2e_ms` are measured here,
    from the moment the request was sent to the moment this process read the first token and the end.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    ttft_ms: float
    e2e_ms: float
    seed: int
    reuse: Reuse
    samples: tuple[Sample, ...] = ()

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of the first sample's tokens; empty where they were not asked for."""
        return self.samples[0].logprobs if self.samples else ()

    @property
    def mode(self) -> ReuseMode:
        """The mode that was served."""
        return self.reuse.mode


@dataclass(frozen=True, slots=True)
class WarmedDocument:
    """A document whose KV is in the store now. `index` counts from 0 over the documents that were given.

    With `already_stored`, nothing was computed. `size_bytes` is the size of its chunk objects. `num_computed_chunks` of
    its `num_chunks` were computed now, the others stored before or counted for another document of the request.
    """

    index: int
    name: str
    num_tokens: int
    size_bytes: int
    already_stored: bool
    elapsed_ms: float
    num_chunks: int = 1
    num_computed_chunks: int = 0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What forgetting documents dropped: chunk objects of stores, their bytes, and runs in nodes' memory.

    `stored_tiers` has the copies by tier: an object that was on two tiers of a store counts on each.
    """

    num_stored_dropped: int
    stored_bytes_dropped: int
    num_resident_dropped: int
    stored_tiers: tuple[TierDropped, ...] = ()


@dataclass(frozen=True, slots=True)
class TierDropped:
    """Copies of chunk objects dropped from one tier ("ram" or "disk") of all stores together."""

    tier: str
    num_objects: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model the cluster serves now, and the modes it serves without force.

    `profile` names its calibration, `policy` what that prescribes ("link:16"). Where LINKED is not among `modes`,
    `linked_refusal` says why, and `can_force_linked` whether `force_linked` helps: it does against a profile.
    """

    name: str
    max_context_tokens: int
    vocab_size: int
    fingerprint: bytes
    modes: tuple[ReuseMode, ...]
    profile: str = ""
    policy: str = ""
    linked_refusal: str = ""
    can_force_linked: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node with a live lease, as it last described itself.

    `role` is "gateway", "prefill", "decode" or "kvstore"; `model` is empty for nodes that serve none. A draining node
    takes no new work. Blocks are those of its KV pool: `available_blocks` are free, or cached and droppable. Each is
    free, referenced (used by a request: none is on a node that does nothing), cached, in transfer or lent. `profile`,
    `policy`, `linked_refusal` and `can_force_linked` are as for `Model`; empty for nodes that serve none. `tiers` are
    those of a kvstore node; `serving` is what a gateway served lately, None of other nodes. Prometheus reads the node's
    metrics at `metrics_address`, "host:port", path /metrics; empty where nowhere.
    """

    node_id: str
    role: str
    address: str
    model: str
    num_running: int
    num_waiting: int
    queued_tokens: int
    total_blocks: int
    available_blocks: int
    referenced_blocks: int
    cached_blocks: int
    in_transfer_blocks: int
    lent_blocks: int
    num_held_chunks: int
    draining: bool
    version: str
    profile: str = ""
    policy: str = ""
    linked_refusal: str = ""
    can_force_linked: bool = False
    tiers: tuple[TierStats, ...] = ()
    serving: ServingFigures | None = None
    metrics_address: str = ""

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return max(0, self.available_blocks - self.cached_blocks)


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """What a gateway served in the last `window_s` seconds, as its clients see it.

    `ttft_…` is arrival to first token, `itl_…` the gap between two tokens; p50 and p95 in milliseconds, 0 where nothing
    was measured.
    """

    window_s: int
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompt tokens whose KV was reused; None where there were none."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else None


@dataclass(frozen=True, slots=True)
class RequestInFlight:
    """A generation under way at the gateway that answers.

    `phase` is "tokenizing", "routing" (a decode node is being chosen, or waited for), "preparing" (it has it, and no
    token came yet) or "decoding". `num_prompt_tokens` is 0 and `decode_node` empty while they are not known;
    `tenant_id` is empty from older releases.
    """

    request_id: str
    phase: str
    age_ms: float
    mode: ReuseMode
    num_prompt_tokens: int
    num_generated_tokens: int
    decode_node: str
    tenant_id: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster as the gateway `gateway_node_id` sees it. Without `directory_reachable`, `nodes` is the last list it
    knew. `requests` are those under way at this gateway, of every tenant, oldest first. `clock_s` is the gateway's
    clock, seconds since 1970; 0 from older releases.
    """

    nodes: tuple[Node, ...]
    directory_reachable: bool
    clock_s: float = 0.0
    requests: tuple[RequestInFlight, ...] = ()
    gateway_node_id: str = ""

    def state_of(self, node: Node) -> str:
        """ "serving" or "draining", as the node last said; "unknown" while the directory is away, as nobody says then
        whether the node is there, unless it is the gateway that answered.
        """
        if not self.directory_reachable and node.node_id != self.gateway_node_id:
            return "unknown"
        return "draining" if node.draining else "serving"
