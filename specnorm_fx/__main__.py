"""``python -m specnorm_fx``: the command ``specnorm-fx``."""

import sys

from specnorm_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
