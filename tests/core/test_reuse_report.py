"""Where a prompt's tokens came from, in its order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spolia_core.reuse import ReuseMode, ReuseReport, SourceRun, SourceSpan, TokenSource

pieces = st.lists(st.tuples(st.sampled_from(TokenSource), st.integers(0, 5)), max_size=12)


@given(pieces, st.randoms(use_true_random=False))
def test_spans_in_any_order_become_the_runs_of_the_prompt(prompt, random):
    spans, start = [], 0
    for source, num_tokens in prompt:
        spans.append(SourceSpan(start, num_tokens, source))
        start += num_tokens
    random.shuffle(spans)
    report = ReuseReport(ReuseMode.LINKED)
    report.place(spans)
    by_token = [source for source, num_tokens in prompt for _ in range(num_tokens)]
    assert [run.source for run in report.runs for _ in range(run.num_tokens)] == by_token
    assert report.sources == Counter(by_token)
    assert all(one.source != other.source for one, other in zip(report.runs, report.runs[1:], strict=False))


def test_later_spans_go_on_with_the_run_before_them():
    report = ReuseReport(ReuseMode.EXACT)
    report.place([SourceSpan(0, 128, TokenSource.DEVICE)])
    report.place([SourceSpan(128, 128, TokenSource.DEVICE), SourceSpan(256, -3, TokenSource.COMPUTED)])
    assert report.runs == [SourceRun(TokenSource.DEVICE, 256)]
    assert report.sources == {TokenSource.DEVICE: 256}
