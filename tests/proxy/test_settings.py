"""Settings: what the sources say, who wins, and the one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy_addon.settings import Address, Settings, SettingsError, load


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def read(
    text: str = "", env: dict[str, str] | None = None, sets: tuple[str, ...] = (), **flags: str
) -> Settings:
    path = Path("sollol.yaml")
    path.write_text(text)
    return load(
        path, env or {}, sets, {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    )


def test_defaults_need_no_source(tmp_path: Path) -> None:
    settings = load(None, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert settings.listen == Address(host="127.0.0.1", port=11434)
    assert settings.state_dir == tmp_path / "state" / "sollol"
    assert settings == Settings()


def test_the_readme_sized_file_is_read_whole() -> None:
    settings = read(
        """
        listen: 0.0.0.0:8000
        modes: [regular@8080, socks5@1080]
        nodes:
          - 10.0.0.2
          - gpu.lan:8001
          - {host: "fe80::2", port: 7, agent: "gpu.lan:11435", parallel: 4, preferred_tasks: [embedding]}
        discovery:
          # mdns: false
        timeouts: {connect_s: 0.5}
        guard:
          clients: [10.0.0.0/8, 2001:db8::/32]
        """
    )
    assert [str(node) for node in settings.nodes] == ["10.0.0.2:11434", "gpu.lan:8001", "[fe80::2]:7"]
    assert settings.nodes[2].agent == "http://gpu.lan:11435"
    assert settings.nodes[2].preferred_tasks == {"embedding"}
    assert settings.discovery.mdns is True
    assert (settings.timeouts.connect_s, settings.timeouts.idle_s) == (0.5, 300)
    assert [str(network) for network in settings.guard.clients] == ["10.0.0.0/8", "2001:db8::/32"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", "host:11434"),
        ("host:1", "host:1"),
        (":9", "127.0.0.1:9"),
        ("[::1]:2", "[::1]:2"),
        ("::1", "[::1]:11434"),
        ("http://host", "host:80"),
        ("http://host:81/", "host:81"),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(text: str, address: str) -> None:
    assert str(read(listen=text).listen) == address


def test_later_sources_win_key_by_key() -> None:
    file = "timeouts: {connect_s: 1, idle_s: 1, load_s: 1}\nlisten: a:1\nnodes: [a, b]"
    env = {
        "SOLLOL_TIMEOUTS__IDLE_S": "2",
        "SOLLOL_TIMEOUTS__LOAD_S": "2",
        "SOLLOL_LISTEN": "b:2",
        "HOME": "x",
    }
    settings = read(file, env, ("timeouts.load-s=3", "listen=c:3", "nodes=c,d"), listen="d:4")
    timeouts = settings.timeouts
    assert (timeouts.connect_s, timeouts.idle_s, timeouts.load_s) == (1, 2, 3)
    assert str(settings.listen) == "d:4"
    assert [node.host for node in settings.nodes] == ["c", "d"]


def test_variables_of_the_other_parts_are_left_alone() -> None:
    env = {
        "SOLLOL_URL": "x",
        "SOLLOL_AGENT_LISTEN": "x",
        "SOLLOL_PROXY_ARGS": "",
        "SOLLOL_SHARD_ARGS": "",
        "SOLLOL_RPC_SERVER": "x",
        "SOLLOL_AGENT_TOKEN_X": "",
        "SOLLOL_AGENT_TOKEN": "s3",
    }
    token = read(env=env).agent_token
    assert token is not None
    assert token.get_secret_value() == "s3"


def test_what_is_a_coordinators() -> None:
    settings = read(
        "shard: {min_gpu_share: 0.5}",
        {"SOLLOL_SHARD__WAIT_S": "5", "SOLLOL_SHARD__MODELS": "Llama3.1:70b,big"},
        ("nodes=shard://10.0.0.9,shard://[fd00::2]:99,10.0.0.1",),
    )
    assert settings.shard.models == {
        "registry.ollama.ai/library/llama3.1:70b",
        "registry.ollama.ai/library/big:latest",
    }
    assert (settings.shard.min_gpu_share, settings.shard.wait_s) == (0.5, 5)
    assert [(str(node), node.kind) for node in settings.nodes] == [
        ("10.0.0.9:11436", "shard"),
        ("[fd00::2]:99", "shard"),
        ("10.0.0.1:11434", "ollama"),
    ]


def test_the_users_own_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "cfg" / "sollol").mkdir(parents=True)
    (tmp_path / "cfg" / "sollol" / "sollol.yaml").write_text("listen: :7")
    assert load(None, {"XDG_CONFIG_HOME": str(tmp_path / "cfg")}).listen.port == 7
    Path("sollol.yaml").write_text("listen: :8")
    assert load(None, {"XDG_CONFIG_HOME": str(tmp_path / "cfg")}).listen.port == 8


# ruff: noqa: E501
FILE_MISTAKES = [
    (
        "listen: a\n\ntimeouts:\n  conect_s: 3\n",
        "sollol.yaml:4: timeouts.conect_s is not a setting; did you mean connect_s?",
    ),
    ("\nconnect_s: 3", "sollol.yaml:2: connect_s is not a setting; did you mean timeouts.connect_s?"),
    (
        "pull: {qqq: 3}",
        "sollol.yaml:1: pull.qqq is not a setting; there are replicas",
    ),
    (
        "nodes:\n - a\n - host: b\n   prot: 9",
        "sollol.yaml:4: nodes[1].prot is not a setting; did you mean port?",
    ),
    ("nodes:\n - a\n - b:x", "sollol.yaml:3: nodes[1] should be host:port, not 'b:x'"),
    ("nodes:\n - port: 3", "sollol.yaml:2: nodes[0].host is missing"),
    (
        "nodes:\n - a:70000",
        "sollol.yaml:2: nodes[0].port should be less than or equal to 65535, not '70000'",
    ),
    (
        "listen: https://x",
        "sollol.yaml:1: listen should be host:port of a plain HTTP server, not 'https://x'",
    ),
    ("timeouts:\n  idle_s: fast", "sollol.yaml:2: timeouts.idle_s should be a number, not 'fast'"),
    ("timeouts:\n  idle_s: -1", "sollol.yaml:2: timeouts.idle_s should be greater than 0, not -1"),
    ("timeouts: {idle_s: .inf}", "sollol.yaml:1: timeouts.idle_s should be a number, not inf"),
    ("timeouts: 3", "sollol.yaml:1: timeouts should be a table of settings, not 3"),
    ("retry: {rounds: 1.5}", "sollol.yaml:1: retry.rounds should be a whole number, not 1.5"),
    ("discovery: {mdns: maybe}", "sollol.yaml:1: discovery.mdns should be true or false, not 'maybe'"),
    (
        "placement: best",
        "sollol.yaml:1: placement should be 'finish_time', 'score', 'least_loaded' or 'round_robin', not 'best'",
    ),
    (
        "modes:\n- regular\n- wireguard",
        "sollol.yaml:3: modes[1] should be one of the modes regular, socks5, transparent, reverse, not 'wireguard'",
    ),
    (
        "modes: qqq@80",
        "sollol.yaml:1: modes[0] should be a mode such as regular@8080 (unknown mode), not 'qqq@80'",
    ),
    (
        "guard: {clients: 10.0.0.0/33}",
        "sollol.yaml:1: guard.clients[0] should be a network such as 10.0.0.0/8, not '10.0.0.0/33'",
    ),
    ("guard:\n  clients: 5", "sollol.yaml:2: guard.clients should be a list, not 5"),
    ("agent_token: 31337", "sollol.yaml:1: agent_token should be text"),
    ("a: b: c", "sollol.yaml:1: not valid YAML: mapping values are not allowed here"),
    ("agent_token: s3\nagent_token: s4", 'sollol.yaml:2: not valid YAML: found duplicate key "agent_token"'),
    ("- a", "sollol.yaml:1: should be a table of settings, not list"),
]


@pytest.mark.parametrize(("text", "sentence"), FILE_MISTAKES)
def test_a_mistake_in_the_file(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("env", "sets", "flags", "sentence"),
    [
        (
            {"SOLLOL_TIMEOUTS__CONECT_S": "3"},
            (),
            {},
            "$SOLLOL_TIMEOUTS__CONECT_S: timeouts.conect_s is not a setting; did you mean connect_s?",
        ),
        (
            {"SOLLOL_POLL__INTERVAL_S": "x"},
            (),
            {},
            "$SOLLOL_POLL__INTERVAL_S: poll.interval_s should be a number, not 'x'",
        ),
        (
            {"SOLLOL_TIMEOUTS": "3"},
            (),
            {},
            "$SOLLOL_TIMEOUTS: timeouts should be a table of settings, not '3'",
        ),
        (
            {},
            ("retry.rounds=no",),
            {},
            "--set retry.rounds: retry.rounds should be a whole number, not 'no'",
        ),
        ({}, ("retry",), {}, "--set retry: expected key=value, such as timeouts.connect_s=5"),
        ({}, ("listen=a", "listen.x=3"), {}, "--set listen.x: listen is a single setting"),
        ({}, (), {"listen": "a:b"}, "--listen: listen should be host:port, not 'a:b'"),
    ],
)
def test_a_mistake_elsewhere(
    env: dict[str, str], sets: tuple[str, ...], flags: dict[str, str], sentence: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read("timeouts: {connect_s: 1}", env, sets, **flags)
    assert str(caught.value) == sentence


def test_the_place_is_that_of_the_source_that_won() -> None:
    with pytest.raises(SettingsError, match=r"^\$SOLLOL_NODES: nodes\[0\]\.port should be less"):
        read("nodes:\n - a:1\n - b:2", {"SOLLOL_NODES": "a:70000"})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "none.yaml", {})
    assert str(caught.value) == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary.yaml: cannot be read: it is not UTF-8 text$"):
        load(tmp_path / "binary.yaml", {})


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().placement = "score"
