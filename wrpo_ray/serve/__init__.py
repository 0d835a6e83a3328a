"""An OpenAI-compatible server on Ray Serve LLM, with API keys and limits."""
