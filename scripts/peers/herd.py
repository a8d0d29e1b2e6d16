"""ollama-herd's router without its announcement on the local network, where real nodes would follow it."""

from fleet_manager.cli.server_cli import main  # type: ignore[import-not-found]
from fleet_manager.common.discovery import FleetServiceAdvertiser  # type: ignore[import-not-found]


async def _unannounced(self: object) -> None:
    """Stay on this machine."""


FleetServiceAdvertiser.start = _unannounced
main()
