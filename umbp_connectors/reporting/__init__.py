"""What an engine's node tells the master: which blocks it holds on which tier, off the engine's own threads.

A producer tells a :class:`~umbp_connectors.reporting.feed.Feed` what happened; the
:class:`~umbp_connectors.reporting.reporter.Reporter` makes words of it, keeps a mirror of what the node holds, and
hands the changes to the master's client.
"""
