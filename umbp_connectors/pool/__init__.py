"""The tiers of one node: memory, files and the catalogue that survives a restart.

The modules here own bytes and move them; what lies where is decided by :class:`umbp_core.directory.Directory`.
"""
