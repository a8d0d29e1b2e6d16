"""Many nodes as one Ollama server: a mitmproxy addon. Start reading at ``chain.py``."""
