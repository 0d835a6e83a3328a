"""SFT and preference training (WRPO) on Ray Train and DeepSpeed."""
