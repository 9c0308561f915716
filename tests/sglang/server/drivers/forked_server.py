"""``sglang.launch_server`` whose processes are forked from it.

SGLang starts each of them anew, which then takes most of a test's time to import SGLang a second and a third time.
"""

from __future__ import annotations

import multiprocessing
import runpy


def main() -> None:
    start = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda _method, force=False: start("fork", force)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
