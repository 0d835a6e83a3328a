"""How good each model of a run is on held-out prompts."""
