"""A llama-server behind the Ollama API. Imports ``agent`` only."""
