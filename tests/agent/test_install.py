"""The systemd units: valid, hardened, and installed into the image of a system."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent import install
from agent.cli import app
from agent.install import CannotInstall, UnitName, install_unit, machine_settings, render, template

SOLLOL = Path("/opt/sollol/bin/sollol")
NAMES: list[UnitName] = ["agent", "proxy", "shard"]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty system to install into."""
    image = tmp_path / "image"
    image.mkdir()
    return image


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """A sollol that exists, at a path that needs quoting."""
    path = tmp_path / "100% sollol"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_the_unit_is_valid(name: UnitName, executable: Path, tmp_path: Path) -> None:
    unit = tmp_path / f"sollol-{name}.service"
    unit.write_text(render(name, executable))
    checked = analyze("verify", unit)
    assert (checked.returncode, checked.stderr) == (0, "")
    unit.write_text(render(name, tmp_path / "nowhere"))
    assert "nowhere" in analyze("verify", unit).stderr  # it did look


# Of 10. What is left is what the service is for: the network, and for the agent GPUs and others' processes.
@needs_systemd
@pytest.mark.parametrize(("name", "most"), [("agent", 1.7), ("proxy", 1.4), ("shard", 1.9)])
def test_the_unit_exposes_little(name: UnitName, most: float, tmp_path: Path) -> None:
    unit = tmp_path / f"sollol-{name}.service"
    unit.write_text(render(name, SOLLOL))
    checked = analyze("security", "--offline=true", f"--threshold={most * 10:.0f}", unit)
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", checked.stdout)
    assert exposure is not None, checked.stderr
    assert float(exposure[1]) <= most
    assert checked.returncode == 0
    table = json.loads(analyze("security", "--offline=true", "--json=short", unit).stdout)
    exposed = {row["json_field"] for row in table if row["set"] is False and float(row["exposure"] or 0) > 0}
    assert not exposed & {"UserOrDynamicUser", "NoNewPrivileges", "ProtectSystem", "CapabilityBoundingSet"}


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_runs_as_what_systemd_can_watch(name: UnitName) -> None:
    lines = template(name).splitlines()
    assert {"Type=notify", "DynamicUser=yes", "Restart=always"} <= set(lines)
    assert any(line.startswith("WatchdogSec=") for line in lines)
    (command,) = [line for line in lines if line.startswith("ExecStart=")]
    assert command.startswith(f"ExecStart={SOLLOL} {name} ")
    assert f"StateDirectory=sollol-{name}" in lines
    assert f"--state-dir %S/sollol-{name}" in command


def test_the_agent_may_use_nvidias_devices_and_the_proxy_none() -> None:
    assert "DeviceAllow=char-nvidia-uvm rw" in template("agent")
    assert "PrivateDevices=yes" not in template("agent")
    assert "PrivateDevices=yes" in template("proxy")


def test_the_agent_may_hold_a_models_layers() -> None:
    """An rpc-server is its child: what the agent alone needs must not be the limit of both."""
    lines = template("agent").splitlines()
    assert not [line for line in lines if line.startswith(("MemoryMax=", "MemoryHigh="))]
    assert "OOMPolicy=continue" in lines
    (tasks,) = [line for line in lines if line.startswith("TasksMax=")]
    assert int(tasks.removeprefix("TasksMax=")) >= 1024  # a thread for each CPU, and several rpc-servers


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("/opt/sollol/bin/sollol", "/opt/sollol/bin/sollol"),
        ("/srv/my sollol", '"/srv/my sollol"'),
        ("/srv/100%/$x", "/srv/100%%/$$x"),
    ],
)
def test_render_names_the_sollol_to_run(path: str, written: str) -> None:
    assert f"ExecStart={written} agent --state-dir" in render("agent", Path(path))


def test_what_depends_on_the_machine(image: Path) -> None:
    (image / "etc").mkdir()
    assert machine_settings("agent", SOLLOL, image) == ""
    (image / "etc/group").write_text("root:x:0:\nollama:x:999:\n")
    assert "SupplementaryGroups=ollama" in machine_settings("agent", SOLLOL, image)
    assert "render" not in machine_settings("agent", SOLLOL, image)
    (image / "etc/group").write_text("root:x:0:\nvideo:x:44:\nrender:x:104:\n")
    assert "SupplementaryGroups=render video" in machine_settings("agent", SOLLOL, image)
    assert machine_settings("proxy", SOLLOL, image) == ""
    assert "ProtectHome=read-only" in machine_settings("proxy", Path("/home/me/.venv/bin/sollol"), image)


@needs_systemd
def test_install_into_an_image_enables_and_starts_nothing(image: Path) -> None:
    ran = CliRunner().invoke(
        app,
        ["install", "--with-proxy", "--with-shard", "--prefix", str(image), "--executable", str(SOLLOL)],
    )
    assert ran.exit_code == 0, ran.output
    units = image / "etc/systemd/system"
    for name in NAMES:
        unit = f"sollol-{name}.service"
        assert (units / unit).read_text() == template(name)
        assert (units / "multi-user.target.wants" / unit).is_symlink()
        assert f"write {units / unit}" in ran.output
        assert f"enable {unit}" in ran.output
    assert "restart" not in ran.output


def test_dry_run_touches_nothing(image: Path, executable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_run", lambda command: pytest.fail(f"ran {command}"))
    before = sorted(image.rglob("*"))
    steps = install_unit("agent", prefix=image, executable=executable, dry_run=True)
    assert steps[0] == f"write {image / 'etc/systemd/system/sollol-agent.service'}"
    assert sorted(image.rglob("*")) == before
    monkeypatch.setattr(install, "_check_executable", lambda sollol: None)
    on_this_machine = install_unit("agent", executable=SOLLOL, dry_run=True)
    assert on_this_machine[-3:] == [
        "run systemctl daemon-reload",
        "run systemctl enable sollol-agent.service",
        "run systemctl restart sollol-agent.service",
    ]


def test_a_sollol_that_the_services_user_cannot_run_is_refused(executable: Path) -> None:
    executable.parent.chmod(0o700)
    with pytest.raises(CannotInstall, match=r"may not enter .*; install SOLLOL where everyone may read it"):
        install_unit("agent", executable=executable, dry_run=True)
    executable.chmod(0o644)
    with pytest.raises(CannotInstall, match="there is no executable"):
        install_unit("agent", executable=executable, dry_run=True)


def test_a_systemctl_that_fails_is_told(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin/systemctl"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho hello >&2\necho 'Failed to enable unit: no' >&2\nexit 4\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    with pytest.raises(CannotInstall, match=r"enable sollol-agent.service failed: Failed to enable unit: no"):
        install_unit("agent", prefix=image, executable=SOLLOL)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotInstall, match="has no systemctl"):
        install_unit("agent", prefix=image, executable=SOLLOL)


def test_a_place_that_cannot_be_written_is_told(image: Path) -> None:
    (image / "etc").write_text("a file")
    ran = CliRunner().invoke(app, ["install", "--prefix", str(image), "--executable", str(SOLLOL)])
    assert ran.exit_code == 1
    assert "cannot be written: Not a directory" in ran.output
