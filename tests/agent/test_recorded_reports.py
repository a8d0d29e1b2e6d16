"""Reports that agents gave on real machines (``scripts/record_report.py``): each must stay readable."""

import os
import subprocess
import sys
from pathlib import Path

from agent.report import SCHEMA_VERSION, Report
from tests.agent.nvml_stub import Driver

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"

# Peak bandwidths of what NVIDIA sells, from a T4 (0.3 TB/s) to a B300 (8 TB/s), with room on both sides.
PLAUSIBLE_BYTES_S = (100e9, 20e12)


def check(path: Path) -> Report:
    report = Report.model_validate_json(path.read_bytes())
    assert report.schema_version <= SCHEMA_VERSION
    assert report.node_id == "0" * 16
    assert report.host.hostname == "blanked"
    assert report.host.ram_available_bytes <= report.host.ram_total_bytes
    assert [gpu.index for gpu in report.gpus] == list(range(len(report.gpus)))
    for gpu in report.gpus:
        assert 0 <= gpu.memory_free_bytes <= gpu.memory_total_bytes
        assert gpu.memory_used_bytes <= gpu.memory_total_bytes
        assert gpu.uuid is None or gpu.uuid.endswith("-0000-0000-0000-000000000000")
        # NVML tells every card's; None would mean that this went wrong.
        assert gpu.memory_bandwidth_bytes_s is not None
        assert PLAUSIBLE_BYTES_S[0] < gpu.memory_bandwidth_bytes_s < PLAUSIBLE_BYTES_S[1]
    assert report.ollama.reachable is False
    assert set(report.stale) == {"ollama.resident", "ollama.version", "ollama.models"}
    return report


def test_recording_with_two_gpus(nvml_library: Path, tmp_path: Path) -> None:
    said, out = tmp_path / "nvml.txt", tmp_path / "report.json"
    Driver(said).have(2)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(nvml_library.parent),
        "SOLLOL_NVML_STUB": str(said),
    }
    script = ROOT / "scripts/record_report.py"
    subprocess.run([sys.executable, script, out], check=True, timeout=60, env=environment)
    assert len(check(out).gpus) == 2


def test_every_recorded_report_is_read_and_plausible() -> None:
    found = sorted(FIXTURES.glob("report_*.json"))
    assert found
    for path in found:
        check(path)
