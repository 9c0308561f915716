"""The hashes under which engines publish a prompt's blocks, computed from its token ids.

A router or a tool that has them can ask a master for a prompt that no engine has seen the request of.  Nothing of an
engine is imported; that the results are the engines' own is checked beside every installed engine.
"""
