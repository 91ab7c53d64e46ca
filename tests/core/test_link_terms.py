"""On what terms LINKED is served: the profile's, the operator's, or the default."""

from __future__ import annotations

import pytest

from spolia_core.errors import NotSupported
from spolia_core.link_policy import LinkPolicy
from spolia_core.link_terms import LinkTerms
from spolia_core.profile import PolicyLoss, ReuseProfile

ALLOWS = ReuseProfile("0" * 64, True, LinkPolicy(4, 2))
FORBIDS = ReuseProfile("0" * 64, False, LinkPolicy(32, 2), measured=(PolicyLoss("sinks:2+link:32", 0.5, 7.0, 0.2),))


def test_without_a_profile_the_default_serves() -> None:
    terms = LinkTerms.of(None)
    assert (terms.profile, terms.policy, terms.refusal) == ("default", LinkPolicy(16, 0), "")
    assert not terms.check(force_linked=False)
    assert not terms.check(force_linked=True), "there is nothing to be forced"


def test_a_profile_gives_its_name_and_its_policy() -> None:
    terms = LinkTerms.of(ALLOWS)
    assert (terms.profile, terms.policy, terms.refusal) == (ALLOWS.name, LinkPolicy(4, 2), "")
    assert not terms.check(force_linked=True)


def test_a_forbidding_profile_refuses_with_its_figures_unless_forced() -> None:
    terms = LinkTerms.of(FORBIDS)
    with pytest.raises(NotSupported) as caught:
        terms.check(force_linked=False)
    words = caught.value.message
    assert all(word in words for word in (FORBIDS.name, "0.5 nats", "7 points", "0.01 nats", "EXACT", "force_linked"))
    assert (caught.value.field, caught.value.actual) == ("profile", FORBIDS.name)
    assert terms.check(force_linked=True)


@pytest.mark.parametrize("profile", [None, ALLOWS, FORBIDS])
def test_tokens_set_by_hand_take_the_place_of_the_profile_but_not_of_its_sinks(profile: ReuseProfile | None) -> None:
    terms = LinkTerms.of(profile, 0)
    sinks = profile.policy.num_sink_tokens if profile else 0
    assert (terms.profile, terms.policy, terms.refusal) == ("manual", LinkPolicy(0, sinks), "")
