"""`python -m wrpo_ray` is `wrpo`."""

import sys

from wrpo_ray.cli.entry import main

sys.exit(main())
