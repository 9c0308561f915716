"""What a master knows and decides: nodes and their lives, placement, replicas, victims.  No I/O, threads or clock."""
