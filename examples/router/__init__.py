"""An OpenAI-compatible router that sends a prompt to the worker whose KV is cheapest to reach.

Start it with ``python -m examples.router --master ADDRESS``; see docs/router.md.

=================  ================================================================
``costs``          the decision, as pure functions: what a worker would cost, and which is best
``books``          what the router knows of its workers: seats, queues, speeds
``fleet``          keeps the books true: nodes of the master, health, models, metrics of workers
``speeds``         seconds per token, read off what a worker's ``/metrics`` says
``planner``        from a prompt to the ranking of the workers, through hashes and the master
``forwarding``     one request to one worker, with deadlines
``app``            the HTTP side
``metrics``        what the router counts
``settings``       its options
=================  ================================================================
"""
