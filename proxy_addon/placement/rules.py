"""What configuration says of who serves what; placement has all else from the fleet itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from proxy_addon.analysis import Kind

if TYPE_CHECKING:
    from proxy_addon.settings import Settings


@dataclass(frozen=True, slots=True)
class Rules:
    """Made once from the settings ``shard``, ``specialise`` and ``embeddings_max_vram_bytes``."""

    models: frozenset[str] = frozenset()  #: canonical names of those that are always a coordinator's
    min_gpu_share: float = 0.0  #: with less of the model on its GPUs a node does not hold it
    specialise: Mapping[Kind, frozenset[str]] = field(default_factory=dict)  #: kind → nodes that should do it
    specialise_factor: float = 1.0  #: how many times longer one of them may take than another node
    embeddings_max_vram_bytes: int | None = None  #: nodes with more serve none while another node can

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of ``settings``."""
        return cls(
            frozenset(settings.shard.models),
            settings.shard.min_gpu_share,
            {kind: frozenset(nodes) for kind, nodes in settings.specialise.items()},
            settings.specialise_factor,
            settings.embeddings_max_vram_bytes,
        )


NO_RULES = Rules()
