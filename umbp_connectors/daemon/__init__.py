"""The host daemon: it owns the memory and the files of a host's pools, engines come and go.

The daemon runs a :class:`~umbp_connectors.daemon.server.DaemonServer`; an engine has a
:class:`~umbp_connectors.daemon.client.DaemonPool` for each of its pools, which maps the daemon's memory and copies by
itself.  Over the socket goes only who may write or read which page.
"""
