"""``python -m umbp_connectors.master`` is ``umbp-master``."""

from umbp_connectors.cli_master import main

if __name__ == "__main__":
    main()
