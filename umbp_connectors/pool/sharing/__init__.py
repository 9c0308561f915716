"""One pool, read by other processes of the same user on the same host.

The owner of the pool runs a :class:`SharedPoolServer`; the others have a :class:`SharedPoolReader` each, which maps the
arena read-only and copies out of it.  Over the socket goes only what lies where.
"""

from umbp_connectors.pool.sharing.reader import SharedPoolReader
from umbp_connectors.pool.sharing.server import SharedPoolServer

__all__ = ["SharedPoolReader", "SharedPoolServer"]
