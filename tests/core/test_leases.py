from __future__ import annotations

import pytest

from umbp_core.errors import UnknownOwner
from umbp_core.leases import LeaseTable


def test_a_lease_protects_until_its_deadline_and_not_at_it() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a", b"b"], deadline=10.0)
    assert leases.expire(9.9) == []
    assert leases.is_leased(b"a")
    assert leases.expire(10.0) == ["reader"]
    assert not leases.is_leased(b"a")
    assert len(leases) == 0


def test_a_key_is_protected_while_any_owner_leases_it() -> None:
    leases = LeaseTable()
    leases.grant("one", [b"a", b"a"], deadline=10.0)
    leases.grant("two", [b"a"], deadline=20.0)
    assert leases.release("one") == (b"a",)
    assert leases.is_leased(b"a")
    assert leases.release("two") == (b"a",)
    assert not leases.is_leased(b"a")


def test_a_second_grant_adds_keys_and_never_shortens_the_promise() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.grant("reader", [b"b", b"a"], deadline=5.0)
    assert leases.expire(9.0) == []
    assert leases.release("reader") == (b"a", b"b")


def test_a_renewed_lease_outlives_its_first_deadline() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.renew("reader", 30.0)
    leases.renew("reader", 20.0)
    assert leases.expire(29.0) == []
    assert leases.expire(30.0) == ["reader"]


def test_a_grant_does_not_shorten_what_was_renewed() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.renew("reader", 30.0)
    leases.grant("reader", [b"b"], deadline=20.0)
    assert leases.expire(29.0) == []
    assert leases.is_leased(b"a")


def test_what_expired_cannot_be_renewed_in_silence() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.expire(10.0)
    with pytest.raises(UnknownOwner, match="reader"):
        leases.renew("reader", 20.0)
    assert not leases.is_leased(b"a")


def test_releasing_twice_is_harmless() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.release("reader")
    assert leases.release("reader") == ()
    assert leases.expire(99.0) == []


def test_owners_expire_in_the_order_of_their_last_deadlines() -> None:
    leases = LeaseTable()
    leases.grant("renewed", [b"a"], deadline=1.0)
    leases.grant("other", [b"b"], deadline=2.0)
    leases.renew("renewed", 3.0)
    assert leases.expire(5.0) == ["other", "renewed"]


def test_an_owner_that_comes_back_is_not_expired_by_its_old_deadline() -> None:
    leases = LeaseTable()
    leases.grant("reader", [b"a"], deadline=10.0)
    leases.release("reader")
    leases.grant("reader", [b"a"], deadline=20.0)
    assert leases.expire(15.0) == []
    assert leases.expire(20.0) == ["reader"]


def test_many_short_leases_with_far_deadlines_are_all_forgotten() -> None:
    """Released owners leave nothing behind, and those that stay still expire."""
    leases = LeaseTable()
    leases.grant("stays", [b"a"], deadline=50.0)
    for number in range(200):
        leases.grant(f"passes-{number}", [b"b"], deadline=1e9)
        leases.release(f"passes-{number}")
    assert len(leases) == 1
    assert not leases.is_leased(b"b")
    assert leases.expire(50.0) == ["stays"]
    assert leases.expire(1e10) == []
