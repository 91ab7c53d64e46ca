"""KVSplit: documents cut into chunks. Pure, and the same in every process and release of Python."""

from spolia_gateway.split.encoded_text import EncodedText
from spolia_gateway.split.pieces import split

__all__ = ["EncodedText", "split"]
