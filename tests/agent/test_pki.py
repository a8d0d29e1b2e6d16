"""Who belongs to a fleet: what the authority signs, where it is kept, and what the contexts make of it."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from agent import join, pki, state


@pytest.fixture
def founder(tmp_path: Path) -> Path:
    join.init_fleet(tmp_path / "founder", "head")
    return tmp_path / "founder"


def member(founder: Path, directory: Path, role: pki.Role = "agent", name: str = "node") -> Path:
    """Make ``directory`` that of a member, without a network between."""
    key, csr = pki.new_request(name, "00112233aabbccdd")
    pki.save_identity(directory, pki.authority(founder), pki.issue(founder, csr, role), key)
    return directory


def handshake(server: Path, client: Path) -> tuple[pki.Identity, pki.Identity]:
    """Let both ends of a connection greet each other in memory; return whom each sees."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        pki.server_context(server).wrap_bio(to_server, to_client, server_side=True),
        pki.client_context(client).wrap_bio(to_client, to_server),
    ]
    done = [False, False]
    while not all(done):
        for number in (1, 0):
            try:
                ends[number].do_handshake()
                done[number] = True
            except ssl.SSLWantReadError:
                pass
    assert ends[0].version() == "TLSv1.3"
    return pki.peer(ends[0].getpeercert()), pki.peer(ends[1].getpeercert())


def test_members_recognise_each_other_with_name_role_and_id(founder: Path, tmp_path: Path) -> None:
    agent = member(founder, tmp_path / "agent", name="gpu-box")
    seen_by_agent, seen_by_coordinator = handshake(agent, founder)
    assert (seen_by_agent.name, seen_by_agent.role) == ("head", "coordinator")
    assert seen_by_coordinator == pki.Identity("gpu-box", "agent", "00112233aabbccdd") == pki.identity(agent)
    assert seen_by_agent == pki.identity(founder)


def test_another_fleets_member_is_refused_by_either_side(founder: Path, tmp_path: Path) -> None:
    join.init_fleet(tmp_path / "other", "other")
    stranger = member(tmp_path / "other", tmp_path / "stranger")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(founder, stranger)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stranger, founder)


def test_an_older_tls_is_not_spoken(founder: Path) -> None:
    for context in (pki.server_context(founder), pki.client_context(founder)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_member_cannot_sign_for_others(founder: Path, tmp_path: Path) -> None:
    agent = member(founder, tmp_path / "agent")
    # With its own certificate in the place of the authority's, what it signs must not count.
    folder = pki.fleet_dir(agent)
    forger = tmp_path / "forger"
    state.write_private(pki.fleet_dir(forger) / pki.CA, (folder / pki.CERTIFICATE).read_bytes())
    state.write_private(pki.fleet_dir(forger) / pki.CA_KEY, (folder / pki.KEY).read_bytes())
    forged = member(forger, tmp_path / "forged", role="coordinator")
    leaf = pki.fleet_dir(forged) / pki.CERTIFICATE
    leaf.write_bytes(leaf.read_bytes() + (folder / pki.CERTIFICATE).read_bytes())  # the whole chain
    (pki.fleet_dir(forged) / pki.CA).write_bytes(pki.authority(founder))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(founder, forged)


def test_the_role_is_the_issuers_to_give(founder: Path, tmp_path: Path) -> None:
    _, csr = pki.new_request("node", "00112233aabbccdd")
    issued = x509.load_pem_x509_certificate(pki.issue(founder, csr, "agent"))
    assert issued.subject.rfc4514_string() == "2.5.4.5=00112233aabbccdd,OU=agent,CN=node"


def test_keys_are_readable_by_their_owner_alone(founder: Path) -> None:
    folder = pki.fleet_dir(founder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o077 for path in folder.iterdir() if path.is_file()} == {
        "ca.pem": 0,
        "ca.key": 0,
        "identity.pem": 0,
        "identity.key": 0,
    }


def test_a_fleet_is_founded_once(founder: Path) -> None:
    before = pki.authority(founder)
    assert join.init_fleet(founder, "again") == pki.Identity("head", "coordinator", _node_id(founder))
    assert pki.authority(founder) == before
    with pytest.raises(pki.PkiError, match=r"there is a fleet in .* already"):
        pki.create_ca(founder, "again")


def test_who_joined_no_fleet_has_no_identity(tmp_path: Path) -> None:
    assert pki.identity(tmp_path) is None
    with pytest.raises(pki.PkiError, match=r"ca\.pem is missing; this node is no member of a fleet"):
        pki.client_context(tmp_path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("name", ["ca.pem", "identity.pem", "identity.key"])
@pytest.mark.parametrize("break_it", [_empty, _cut, Path.unlink])
def test_a_broken_file_is_named_in_one_sentence(
    founder: Path, name: str, break_it: Callable[[Path], None]
) -> None:
    break_it(pki.fleet_dir(founder) / name)
    for context in (pki.server_context, pki.client_context):
        with pytest.raises(pki.PkiError) as caught:
            context(founder)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_key_of_another_certificate_is_noticed(founder: Path, tmp_path: Path) -> None:
    other = member(founder, tmp_path / "other")
    (pki.fleet_dir(founder) / "identity.key").write_bytes(
        (pki.fleet_dir(other) / "identity.key").read_bytes()
    )
    with pytest.raises(pki.PkiError, match=r"identity\.pem and identity\.key do not hold a certificate"):
        pki.server_context(founder)


def test_a_certificate_that_names_no_role_is_nobodys() -> None:
    for subject in ((), ((("commonName", "x"),),), ((("organizationalUnitName", "root"),),)):
        with pytest.raises(pki.PkiError, match="does not name a node, its role and its id"):
            pki.peer({"subject": subject})
    with pytest.raises(pki.PkiError):
        pki.peer(None)


def test_a_request_must_be_signed_by_its_own_key() -> None:
    _, one = pki.new_request("node", "0011223344556677")
    _, two = pki.new_request("node", "0011223344556677")
    middle = len(one) // 2
    for csr in (b"", b"-----BEGIN", one[:middle] + two[middle:]):
        with pytest.raises(pki.PkiError, match="the certificate request"):
            pki.check_request(csr)


def test_a_long_name_is_cut_and_not_refused(founder: Path) -> None:
    _, csr = pki.new_request("ü" * 100, "0011223344556677")
    assert pki.issue(founder, csr, "agent")


def _node_id(directory: Path) -> str:
    return (directory / "node_id").read_text().strip()
