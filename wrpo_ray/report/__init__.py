"""Reports of runs: the live page, the status screen, comparisons, and text summaries."""
