"""A cluster as it is drawn in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from spolia.cli.cluster_lines import REQUESTS, SERVING, TIERS, request_rows, serving_cells, tier_cells
from spolia.cli.units import counted, human_seconds, percent
from spolia.errors import SpoliaError
from spolia.results import Cluster, Node

BAR_CELLS = 24
STATES = (("referenced", "yellow"), ("in transfer", "cyan"), ("lent", "magenta"), ("cached", "green"), ("free", "dim"))
"""What a pool's blocks hold, and its colour: first what is in use."""

FRAME_LINES = 14
"""Heads, titles and the space between them."""

MIN_REQUESTS = 5


class View:
    """What was seen last, and since when nothing was. `now` in monotonic seconds."""

    def __init__(self, address: str, found: Cluster, now: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._found = found
        self._now = now
        self._seen_s = now()
        self._error: SpoliaError | None = None

    def saw(self, found: Cluster) -> None:
        """The gateway answered."""
        self._found, self._seen_s, self._error = found, self._now(), None

    def missed(self, error: SpoliaError) -> None:
        """It did not."""
        self._error = error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many requests as the height has room for."""
        found = self._found
        nodes = sorted(found.nodes, key=lambda node: (node.role, node.node_id))
        engines = [node for node in nodes if node.total_blocks]
        tiers = [tier_cells(node.node_id, tier) for node in nodes for tier in node.tiers]
        gateways = [serving_cells(node.node_id, node.serving) for node in nodes if node.serving is not None]
        num_lines = len(nodes) + len(engines) + len(tiers) + len(gateways) + FRAME_LINES
        yield self._headline(nodes)
        yield Group(
            _nodes(nodes, found),
            *_titled("last minute", SERVING, gateways),
            _pools(engines),
            *_titled("stores", TIERS, tiers),
            *_requests(found, max(MIN_REQUESTS, options.max_height - num_lines)),
        )

    def _headline(self, nodes: Sequence[Node]) -> Text:
        line = Text.assemble(("spolia ", "bold"), f"{self._address}  {counted(len(nodes), 'node')}")
        if self._error is not None:
            age = human_seconds(self._now() - self._seen_s)
            line.append(f"  no answer for {age}: {self._error.message}", "bold red")
        elif not self._found.directory_reachable:
            line.append("  the directory cannot be reached; this is the last list the gateway knew", "bold red")
        return line


def _nodes(nodes: Sequence[Node], found: Cluster) -> Table:
    table = _table("node", "role", "address", "state", "model", "running", "waiting", "queued tokens", "chunks held")
    for node in nodes:
        word = found.state_of(node)
        state = Text(word, "green" if word == "serving" else "yellow")
        load = (node.num_running, node.num_waiting, node.queued_tokens, node.num_held_chunks)
        _add(table, node.node_id, node.role, node.address, state, node.model or "-", *map(str, load))
    return table


def _pools(nodes: Sequence[Node]) -> Group:
    """Each pool as a bar, and its blocks by state."""
    table = _table("pool", "", "in use", *(name for name, _ in STATES), "blocks")
    for node in nodes:
        counts = _blocks(node)
        in_use = 1 - node.available_blocks / node.total_blocks
        cells = [Text(str(count), colour) for count, (_, colour) in zip(counts, STATES, strict=True)]
        _add(table, node.node_id, _bar(counts), percent(in_use), *cells, str(node.total_blocks))
    return Group("", table) if nodes else Group()


def _blocks(node: Node) -> list[int]:
    """In the order of `STATES`."""
    return [node.referenced_blocks, node.in_transfer_blocks, node.lent_blocks, node.cached_blocks, node.free_blocks]


def _bar(counts: Sequence[int]) -> Text:
    """As long for every pool; whoever holds a block gets a cell, as long as there are cells."""
    total, bar, left = sum(counts), Text(), BAR_CELLS
    for count, (_, colour) in zip(counts[:-1], STATES[:-1], strict=True):
        cells = min(left, max(1, round(BAR_CELLS * count / total))) if count else 0
        bar.append("█" * cells, colour)
        left -= cells
    return bar.append("·" * left, STATES[-1][1])


def _titled(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Table | str]:
    table = _table(*head, title=title)
    for row in rows:
        _add(table, *row)
    return ["", table] if table.row_count else []


def _requests(found: Cluster, room: int) -> list[Table | str]:
    rows = request_rows(found)
    shown = _titled(counted(len(rows), "request in flight", "requests in flight"), REQUESTS, rows[:room])
    return [*shown, f"… and {len(rows) - room} more"] if len(rows) > room else shown


def _add(table: Table, *cells: str | Text) -> None:
    """A row as it is: names are no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _table(*head: str, title: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=title or None, title_justify="left")
    table.title_style = "bold"
    for name in head:
        table.add_column(name, no_wrap=True)
    return table
