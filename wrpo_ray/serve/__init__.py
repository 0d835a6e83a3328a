"""Models behind an OpenAI-compatible endpoint: Ray Serve LLM, with keys and limits before it."""
