"""What SOLLOL knows of Ollama itself: names, client."""
