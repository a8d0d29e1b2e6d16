"""What every test can use."""

from tests.fakes.fixtures import fake_agent, ollama_node

__all__ = ["fake_agent", "ollama_node"]
