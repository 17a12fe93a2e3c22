"""`python -m rsoups.cli`, the same as the command `rsoups`."""

import sys

from rsoups.cli.main import main

sys.exit(main())
