"""Real data beside the repository: `../shared`, or where WRPO_TEST_DATA says."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(
    os.environ.get("WRPO_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data"
).absolute()
"""Published answers and results of benchmarks; tests that read them are skipped without them."""
CRDS = DATA.parent / "kuberay-crds"
"""KubeRay's CustomResourceDefinitions, beside that folder."""
