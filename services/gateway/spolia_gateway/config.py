"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from spolia_core.ids import MAX_TENANT_BYTES, SHARED_TENANT, is_tenant_id
from spolia_core.key_book import Role
from spolia_core.splitting import DEFAULT_SPLIT_TOKENS, MAX_SPLIT_TOKENS, MIN_SPLIT_TOKENS, Splitter, Splitting
from spolia_gateway.attempts import RetryPolicy
from spolia_gateway.caller import Caller
from spolia_gateway.limits import RequestLimits
from spolia_gateway.own_names import OwnNames, is_host_name
from spolia_node.config import NodeConfig, at_least, between, one_of, setting

DEFAULT_PORT = 7300
DEFAULT_HTTP_PORT = 8000
OFF = -1
MAX_IDS_PER_CALL = 4096
"""What the store takes in one call."""


def _tenant(value: str) -> str | None:
    return None if is_tenant_id(value) else f"1 … {MAX_TENANT_BYTES} bytes of printable ASCII"


@dataclass(frozen=True)
class GatewayConfig(NodeConfig):
    """Settings of a gateway. It needs `directory`, to know the nodes, and `model`, to tokenize."""

    role: ClassVar[str] = "gateway"

    port: int = setting(DEFAULT_PORT, "Port clients connect to; 0 takes a free one.", check=between(0, 65535))
    http_port: int = setting(
        DEFAULT_HTTP_PORT,
        "Port of the OpenAI-compatible HTTP server; 0 takes a free one, -1 turns it off.",
        check=between(OFF, 65535),
    )
    http_max_body_bytes: int = setting(
        32 << 20, "Largest body of an HTTP request, in bytes; raise it with max_prompt_bytes.", check=at_least(1)
    )
    http_allowed_hosts: tuple[str, ...] = setting(
        (),
        "Further host names, without ports and with commas between, for whom HTTP is served where host is loopback and "
        "callers need no key: of a proxy before the gateway, or of pages and extensions of browsers that call it; "
        "*: for all, and any page that a browser of this machine shows can use the gateway.",
        check=lambda names: None if all(map(is_host_name, names)) else "host names or addresses without ports, or *",
    )
    max_connections: int = setting(
        4096,
        "Most connections of clients at once, to each of HTTP and gRPC; further ones are refused, over HTTP where all "
        "others are being answered. Each takes a file descriptor.",
        check=at_least(1),
    )
    model: Path | None = setting(
        None, "Hugging Face-format directory of the model served; its tokenizer files are read, its weights are not."
    )
    model_name: str = setting("", "Name under which decode nodes serve the model; empty: the directory's name.")
    tenant: str = setting(
        "default",
        f"Tenant whose chunks requests without a key use; those of {SHARED_TENANT!r} are readable by all.",
        check=_tenant,
    )
    public_tls_dir: Path | None = setting(
        None,
        "Folder with the certificate that users are shown (tls.crt, tls.key) where it is not the one that nodes are "
        "shown, of tls_dir: one that browsers and clients believe.",
    )
    keys: str = setting(
        "",
        "API keys: a file that spolia keys writes, or the URL of a Redis that holds them (redis://HOST/0#NAME); "
        "changes count within seconds. Needed when host is not loopback.",
        secret=True,
    )
    allow_anonymous: bool = setting(
        False, "Serve callers without a key too, as users of `tenant`; outside loopback, whoever reaches the port."
    )
    shared_documents: bool = setting(
        False,
        f"Also reuse documents that operators stored under the tenant {SHARED_TENANT}; costs a question to the store "
        "for each LINKED request.",
    )
    max_prompt_bytes: int = setting(
        8 << 20, "Largest prompt, or list of documents, in bytes of text; raise for long contexts.", check=at_least(1)
    )
    max_parts: int = setting(4096, "Most parts in a prompt, or messages in a chat over gRPC.", check=at_least(1))
    max_documents: int = setting(4096, "Most documents in one request.", check=between(1, 4096))
    splitter: str = setting(
        "document",
        "Where documents are cut into chunks unless a request says: document (nowhere), paragraph, sentence or fixed; "
        "changing it makes what was stored unknown.",
        check=one_of(*(known.name.lower() for known in Splitter)),
    )
    split_max_tokens: int = setting(
        DEFAULT_SPLIT_TOKENS,
        "Most tokens of a chunk, unless a request says, for all splitters but document; more lose less to linking, "
        "fewer less to an edit.",
        check=between(MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS),
    )
    max_chunks: int = setting(
        4096, "Most chunks that one request's documents may be cut into.", check=between(1, MAX_IDS_PER_CALL)
    )
    default_timeout_s: float = setting(
        600.0,
        "Seconds a Generate or Warm call may take where the client set no deadline.",
        check=between(0.001, 86400.0),
    )
    max_requests: int = setting(1024, "Most requests under way at once; more are told to come back.", check=at_least(1))
    max_attempts: int = setting(
        6, "Most nodes a request is tried on before its first token, or may lose in all.", check=at_least(1)
    )
    replay_patience_s: float = setting(
        10.0, "Seconds to wait for a decode node to take over a broken answer.", check=between(0.0, 3600.0)
    )
    warm_concurrency: int = setting(
        8, "Chunks of one Warm request compiled at once; about twice the number of prefill nodes.", check=at_least(1)
    )
    tokenizer_cache_bytes: int = setting(
        64 << 20, "Memory for recently tokenized texts, in bytes; 0 turns the cache off.", check=at_least(0)
    )

    def check_together(self) -> str | None:
        """Outside loopback callers show keys, unless it is said that they need not."""
        if not self.is_local and not self.keys and not self.allow_anonymous:
            return (
                f"keys must be set when host is not loopback; host is {self.host} (spolia keys create makes one; "
                "allow_anonymous goes without)"
            )
        if self.allow_anonymous and self.tenant == SHARED_TENANT and not (self.is_local and not self.keys):
            return f"tenant must not be {SHARED_TENANT} with allow_anonymous: only operators write there"
        return None

    @property
    def anonymous(self) -> Caller | None:
        """Who a caller without a key is: on loopback without keys the one who runs the machine, else nobody."""
        if self.is_local and not self.keys:
            return Caller(self.tenant, frozenset(Role))
        return Caller(self.tenant) if self.allow_anonymous else None

    @property
    def own_names(self) -> OwnNames | None:
        """Where only this machine can connect and need show nothing: the names it has. None where others come too, or
        all show keys: a browser has no key to give away, and a proxy's names are its own matter.
        """
        if not self.is_local or self.anonymous is None:
            return None
        return OwnNames((self.advertise_host, *self.http_allowed_hosts))

    @property
    def max_client_files(self) -> int:
        """Connections over gRPC, and as many over HTTP where it is on."""
        return self.max_connections * (1 if self.http_port == OFF else 2)

    @cached_property
    def served_name(self) -> str:
        """The model's name; empty when no model is set."""
        return self.model_name or (self.model.resolve().name if self.model is not None else "")

    @cached_property
    def limits(self) -> RequestLimits:
        """Bounds on one request."""
        return RequestLimits(self.max_prompt_bytes, self.max_documents, self.max_parts, self.max_chunks)

    @cached_property
    def splitting(self) -> Splitting:
        """How documents are cut where a request leaves it open."""
        return Splitting(Splitter[self.splitter.upper()], self.split_max_tokens)

    @cached_property
    def retry_policy(self) -> RetryPolicy:
        """How long to look for a node."""
        return RetryPolicy(max_attempts=self.max_attempts, patience_s=self.replay_patience_s)
