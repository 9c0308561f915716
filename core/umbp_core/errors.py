"""The exception tree.

::

    UmbpError
      ConfigError             the user's configuration cannot be used; stops a start
      StateError              our own code broke a contract of the core
        IllegalTransition     a state machine has no such transition; nothing was changed
        UnknownOwner          an owner, op or object id that was never given out
      CapacityError           a request larger than the whole of a tier
      TransferError           bytes did not arrive
        VerificationError     bytes arrived but are not the ones that were stored
        DeadlineExceeded      an op did not end in time
      TierUnavailable         a tier cannot be used: missing, read-only, full, locked, foreign
      MasterError             a call to a master did not do what it should
        InvalidRequest        the request is malformed or out of bounds; repeating it does not help
        AlreadyRegistered     a living node has this id
        MasterUnavailable     the master was not reached, or not in time
        ProtocolError         the other side sent what is not understood
        AccessDenied          a token or a certificate is wanted and was not given

Every message says what happened, to which id, and what to do about it.
"""

from __future__ import annotations


class UmbpError(Exception):
    """Base of every exception that this project raises on purpose."""


class ConfigError(UmbpError):
    """The configuration cannot be used; raised at start only."""


class StateError(UmbpError):
    """A caller inside this project broke a contract; never caused by the user or the network."""


class IllegalTransition(StateError):
    """A state machine has no transition for this event; its state is unchanged."""

    def __init__(self, machine: str, subject: str, state: str, event: str) -> None:
        super().__init__(
            f"{machine} of {subject}: no transition for event {event} in state {state}; nothing was changed"
        )
        self.machine = machine
        self.subject = subject
        self.state = state
        self.event = event


class UnknownOwner(StateError):
    """An owner, op or object id that is not known (any more)."""


class CapacityError(UmbpError):
    """One object is larger than the whole tier it should go to."""


class TransferError(UmbpError):
    """Bytes did not arrive where they should."""


class VerificationError(TransferError):
    """Identity or checksum of loaded bytes is not what was stored (law L1)."""


class DeadlineExceeded(TransferError):
    """An op did not end before its deadline (law L4)."""


class TierUnavailable(UmbpError):
    """A tier cannot be used; the service goes on without it."""


class MasterError(UmbpError):
    """A call to a master did not do what it should."""


class InvalidRequest(MasterError):
    """The request is malformed or out of bounds; sending it again brings the same answer."""


class AlreadyRegistered(MasterError):
    """A living node has this id, and the newcomer does not supersede it."""


class MasterUnavailable(MasterError):
    """The master was not reached, or not in time; the caller goes on without its advice."""


class ProtocolError(MasterError):
    """The other side sent what is not understood; the connection is not used any more."""


class AccessDenied(MasterError):
    """The other side wants a token or a certificate that was not given."""
