"""One node: its report, its Ollama, its GPUs. Imports neither ``proxy_addon`` nor ``shard``."""

__version__ = "0.1.0"
