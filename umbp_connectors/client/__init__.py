"""Clients of a master: what talks to it, and what keeps it told."""
