"""What root writes for a service is the service's: it runs as a user of its own, which root need not know."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import join, pki, state

ROOT = Path(__file__).parents[2]
SERVICE_UID, SERVICE_GID = 64321, 64322

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for others")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter, as /var/lib."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def directory(place: Path) -> Path:
    """The state directory of a service that ran before."""
    made = place / "sollol-agent"
    made.mkdir(0o700)
    os.chown(made, SERVICE_UID, SERVICE_GID)
    return made


def owners(directory: Path) -> set[tuple[int, int]]:
    found = [each.lstat() for each in (directory, *directory.rglob("*"))]
    return {(status.st_uid, status.st_gid) for status in found}


def as_service(code: str, *arguments: str) -> str:
    """Run ``code`` after imports that need more rights than the service has here."""
    drop = f"import os; os.setgroups([]); os.setgid({SERVICE_GID}); os.setuid({SERVICE_UID})"
    command = [sys.executable, "-c", f"import sys; from pathlib import Path; from agent import join, pki, state; import cryptography.hazmat.backends.openssl.backend; {drop}; {code}"]  # fmt: skip  # noqa: E501
    ran = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


def test_a_fleet_that_root_founds_serves_the_service(directory: Path) -> None:
    join.init_fleet(directory, "head")
    token = join.issue_token(directory)
    assert owners(directory) == {(SERVICE_UID, SERVICE_GID)}
    # The service reads its key, issues a certificate, and uses the token up.
    code = "d = Path(sys.argv[1]); pki.client_context(d); t = join.Token.parse(sys.argv[2]); "
    code += "r = join.make_request(t, '00' * 16, pki.new_request('n', '0' * 16)[1]); "
    code += "print(pki.identity(d).name, len(join.answer(d, r)) > 1000)"
    assert as_service(code, str(directory), token) == "head True\n"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (directory / "fleet").iterdir()}
    assert modes == {"ca.pem": 0o600, "ca.key": 0o600, "identity.pem": 0o600, "identity.key": 0o600} | {
        "tokens": 0o700
    }


def test_before_its_first_start_there_is_nobody_to_give_it_to(place: Path) -> None:
    """Systemd gives the whole directory to the service's user when it starts it for the first time."""
    directory = place / "sollol-shard"
    assert state.node_id(directory)
    join.init_fleet(directory, "head")
    assert owners(directory) == {(0, 0)}


def test_directories_on_the_way_are_of_whose_place_it_is(place: Path) -> None:
    os.chown(place, SERVICE_UID, SERVICE_GID)
    state.write_private(place / "a/b/file", b"x")
    assert owners(place) == {(SERVICE_UID, SERVICE_GID)}


def test_a_member_whose_files_may_not_be_read_does_not_pass_for_none(directory: Path) -> None:
    join.init_fleet(directory, "head")
    os.chown(directory / "fleet", 0, 0)
    for asked in ("identity", "founded_here"):
        said = as_service(f"pki.{asked}(Path(sys.argv[1]))", str(directory))
        assert "PkiError" in said and said.endswith("cannot be read: Permission denied\n")


def test_no_link_leads_root_elsewhere(directory: Path, place: Path) -> None:
    """Who owns the directory may put into it what he likes."""
    elsewhere = place / "root's"
    elsewhere.write_bytes(b"kept")
    (directory / "fleet").mkdir()
    (directory / "fleet" / pki.CA).symlink_to(elsewhere)
    state.write_private(directory / "fleet" / pki.CA, b"new")
    assert (elsewhere.read_bytes(), elsewhere.stat().st_uid) == (b"kept", 0)
    assert not (directory / "fleet" / pki.CA).is_symlink()


def test_where_a_command_for_a_service_writes(
    place: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SERVICES", place)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state.state_dir_for("sollol-agent") == directory
    assert state.state_dir_for("sollol-shard") == state.state_dir()  # it is not installed
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert state.state_dir_for("sollol-agent") == Path("/elsewhere/sollol")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state.state_dir_for("sollol-agent") == state.state_dir()
