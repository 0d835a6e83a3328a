"""`python -m wrpo_ray` is `wrpo`."""

import sys

from wrpo_ray.cli import main

sys.exit(main())
