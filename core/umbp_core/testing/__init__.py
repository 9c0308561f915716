"""Test kit: plain models, hypothesis machines and fakes that third parties may reuse.

Only this package may import hypothesis and pytest; install them to use it (extra ``[dev]``).  A machine drives a real
part and a plain model side by side and compares them after every step.  Subclass it to test a part of your own, and
give its ``TestCase`` to the test runner::

    class MyPolicyMachine(EvictionPolicyMachine):
        def new_policy(self) -> EvictionPolicy:
            return MyPolicy()

        def new_model(self) -> EvictionPolicy:
            return MySlowButObviousPolicy()

    TestMyPolicy = MyPolicyMachine.TestCase

A suite (``suite_master``, ``suite_native``, ``suite_tier``) is a class of tests for pytest: subclass it, and give it
the part that is tested as a fixture.
"""
