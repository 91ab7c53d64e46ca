"""Client of Spolia: disaggregated LLM serving that reuses the KV of text chunks at any position.

>>> from spolia import Client, Document
>>> with Client("127.0.0.1:7300") as client:
...     print(client.generate([Document(manual), "How is the filter changed?"], mode="linked").text)

Needs grpcio and protobuf only. Errors are the classes of `spolia.errors`.
"""

from spolia import errors
from spolia.async_client import AsyncClient
from spolia.client import Client
from spolia.options import GenerateOptions, Mode, SplitterName
from spolia.parts import ChatMessage, Document, Documents, Part, Parts, TokenIds
from spolia.results import (
    Cluster,
    Delta,
    Forgotten,
    Model,
    Node,
    RequestInFlight,
    Result,
    Reuse,
    Sample,
    ServingFigures,
    TierDropped,
    TokenLogprobs,
    Transfer,
    WarmedDocument,
)
from spolia.stream import AsyncStream, Stream
from spolia.version import __version__
from spolia_core.errors import (
    AlreadyStored,
    Busy,
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)
from spolia_core.reuse import ChunkKind, FinishReason, Miss, MissReason, ReuseMode, TokenSource
from spolia_core.splitting import Splitter

__all__ = [
    "AlreadyStored",
    "AsyncClient",
    "AsyncStream",
    "Busy",
    "Cancelled",
    "ChatMessage",
    "ChunkKind",
    "Client",
    "Cluster",
    "DataCorrupt",
    "DeadlineExceeded",
    "Delta",
    "Document",
    "Documents",
    "FinishReason",
    "Forbidden",
    "Forgotten",
    "GenerateOptions",
    "InternalError",
    "InvalidRequest",
    "Miss",
    "MissReason",
    "Mode",
    "Model",
    "Node",
    "NotFound",
    "NotSupported",
    "Part",
    "Parts",
    "RequestInFlight",
    "Result",
    "Reuse",
    "ReuseMode",
    "Sample",
    "ServingFigures",
    "Splitter",
    "SplitterName",
    "SpoliaError",
    "Stream",
    "TierDropped",
    "TokenIds",
    "TokenLogprobs",
    "TokenSource",
    "Transfer",
    "Unauthenticated",
    "Unavailable",
    "WarmedDocument",
    "__version__",
    "errors",
]
