from __future__ import annotations

import inspect

import pytest

from umbp_core import errors

TREE = {
    "ConfigError": "UmbpError",
    "StateError": "UmbpError",
    "IllegalTransition": "StateError",
    "UnknownOwner": "StateError",
    "CapacityError": "UmbpError",
    "TransferError": "UmbpError",
    "VerificationError": "TransferError",
    "DeadlineExceeded": "TransferError",
    "TierUnavailable": "UmbpError",
    "MasterError": "UmbpError",
    "InvalidRequest": "MasterError",
    "AlreadyRegistered": "MasterError",
    "MasterUnavailable": "MasterError",
    "ProtocolError": "MasterError",
    "AccessDenied": "MasterError",
}


def test_the_tree_is_the_documented_one() -> None:
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    assert classes.pop("UmbpError").__bases__ == (Exception,)
    assert {name: cls.__bases__[0].__name__ for name, cls in classes.items()} == TREE


@pytest.mark.parametrize("name", TREE)
def test_the_module_page_draws_every_error_with_what_it_means(name: str) -> None:
    (line,) = [line for line in (errors.__doc__ or "").splitlines() if line.split() and line.split()[0] == name]
    assert len(line.split()) > 3


def test_an_illegal_transition_names_machine_subject_state_and_event() -> None:
    error = errors.IllegalTransition("life", "request r1", "Finished", "scheduled")
    assert (error.machine, error.subject, error.state, error.event) == ("life", "request r1", "Finished", "scheduled")
    for part in ("life", "request r1", "Finished", "scheduled", "nothing was changed"):
        assert part in str(error)
