"""The leader's side of a node: metadata decisions for all ranks, no bytes.

``node``       the directory with its catalogue: what is where, and what survives a restart
``ledger``     ops in flight on all ranks, and how each of them ended
``demotions``  which committed DRAM objects go to SSD next

Everything here runs on the engine's scheduler thread and never waits.
"""
