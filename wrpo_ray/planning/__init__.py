"""What a run will take before it runs: work, tokens, GPU-hours, money, time; and a simulator."""
