"""Where paragraphs and sentences end, in characters.

Patterns name their characters and are ASCII only otherwise, so that no release of Python or Unicode moves a boundary.
Each runs in time linear in the text, whatever the text: what may repeat never gives back (`++`), and is not met twice.
"""

from __future__ import annotations

import re

PARAGRAPH_END = re.compile(r"\n(?:[ \t\r\f\v]*+\n)++", re.ASCII)
"""A blank line or several belong to the paragraph before them; what indents the next paragraph does not."""

_OPEN_ENDS = ".!?…।؟۔"  # end a sentence where white space follows
_FULL_ENDS = "。！？｡"  # end one whatever follows
_CLOSERS = "\"'”’»)\\]」』）"

SENTENCE_END = re.compile(
    # The search looks for one of these characters, which is fast, and only then at what stands around it.
    rf"[\n{_OPEN_ENDS}{_FULL_ENDS}]"
    r"(?:"
    # a blank line
    r"(?<=\n)(?:[ \t\r\f\v]*+\n)++"
    r"|"
    # a full stop; not an initial, an enumeration or an abbreviation
    rf"(?<=[{_OPEN_ENDS}])(?<!\b[A-Za-z]\.)(?<!\n\d\.)(?<!\n\d\d\.)(?<!\b(?:Mr|Ms|Dr|St|vs|cf|No)\.)(?<!\bMrs\.)"
    rf"[{_CLOSERS}]{{0,3}}+(?=\s)"
    # line breaks belong to the sentence before them; a space to the word behind it, as in tokens
    r"(?:[ \t\r\f\v]*+\n)*+"
    r"|"
    rf"(?<=[{_FULL_ENDS}])[{_CLOSERS}]{{0,3}}+(?:[ \t\r\f\v]*+\n)*+"
    r")",
    re.ASCII,
)


def ends_of(pattern: re.Pattern[str], text: str, start: int, end: int) -> list[int]:
    """Ends of the pattern in `text[start:end]`, ascending; the last is `end`, where the last unit ends anyway."""
    ends = [match.end() for match in pattern.finditer(text, start, end)]
    if not ends or ends[-1] != end:
        ends.append(end)
    return ends
