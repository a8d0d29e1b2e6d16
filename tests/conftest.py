"""What every test can use."""

from tests.fakes.fixtures import ollama_node

__all__ = ["ollama_node"]
