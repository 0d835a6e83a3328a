"""Making of data, side by side: sampling and scoring answers through the pipeline, and without.

`make bench` runs it; RESULTS.md has what it found and what it does not show. Each contender
has a process of its own, with nothing imported before, and one thread for its model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
# Actors find the modules of this folder by it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])

import generate
import score
from parts import Measurements, Part
from workload import alone, weights

PARTS: dict[str, tuple[Part, Any, int]] = {
    "generate": (generate.PART, generate.Work, 96),
    "score": (score.PART, score.Work, 20),
}
"""What is measured, on which work, of how many prompts."""
GPU_PARTS: dict[str, tuple[Part, Any, int]] = {
    "generate": (generate.GPU_PART, generate.gpu_work, 1024),
}
"""The same on a GPU."""


def measure(part: Part, work: Any) -> Measurements:
    """Run all contenders on the same work, ours first among them in what is told."""
    load, measured = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory(prefix="wrpo-bench-") as name:
        folder = Path(name)
        work.write(folder)
        size = weights(folder / "model")
        for contender in part.contenders:
            shutil.rmtree(folder / "out", ignore_errors=True)
            measured[contender.__name__] = alone(contender, folder, work)
    for peer in measured.keys() - {"ours"}:
        print(f"{peer}: {part.check(measured['ours'].results, measured[peer].results)}")
    return Measurements(part, measured, work, size, load)


def main() -> None:
    """Measure both parts, or one, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("-n", type=int, help="prompts; for a check: no report is written")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    parts = PARTS if options.device == "cpu" else GPU_PARTS
    for name, (part, work, prompts) in parts.items():
        if options.only in (None, name):
            measurements = measure(part, work(options.n or prompts))
            print(f"\n{measurements.text()}\n", flush=True)
            if not options.n:
                measurements.write(options.output)


if __name__ == "__main__":
    main()
