"""What a request is about, by the seed's analysis: kind of task, complexity, need of a GPU."""

from __future__ import annotations

from typing import Literal

Kind = Literal["generation", "classification", "summarization", "extraction", "embedding"]
Complexity = Literal["simple", "medium", "complex"]
