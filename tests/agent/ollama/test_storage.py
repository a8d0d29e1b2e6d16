"""Stores on disk, written as Ollama writes them."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.ollama import storage
from agent.ollama.storage import NotStored, find_store, manifests, models, resolve, scan, service_setting
from tests.shard.store import Store

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a place with spaces" / "models")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_layer_of_a_model(store: Store) -> None:
    params = {"stop": ["<end>", "User:"], "temperature": 0.7, "num_ctx": 8192}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    layers = [
        store.layer("model", b"GGUF weights", taken_from="/home/me/weights.gguf"),
        store.layer("projector", b"GGUF projector"),
        store.layer("adapter", b"GGUF lora one"),
        store.layer("adapter", b"GGUF lora two"),
        store.layer("draft", b"GGUF draft"),
        store.layer("template", "{{ .System }} {{ .Prompt }}"),
        store.layer("system", "You are a pirate.\nArr."),
        store.layer("params", params),
        store.layer("messages", messages),
        store.layer("license", "First licence"),
        store.layer("license", "Second licence — ©"),
    ]
    config = {"model_format": "gguf", "model_family": "llama", "parser": "qwen3", "file_type": "Q4_K_M"}
    path = store.write("pirate", layers, config)
    os.utime(path, (1_750_000_000, 1_750_000_000))

    found = resolve(store.root, "pirate")
    assert (found.name, found.digest) == ("pirate:latest", sha256(path))
    manifest = json.loads(path.read_bytes())
    assert found.size_bytes == sum(entry["size"] for entry in [*layers, manifest["config"]])
    assert found.modified_at == datetime.fromtimestamp(1_750_000_000, UTC)
    assert found.blob == store.blob(layers[0]["digest"].removeprefix("sha256:"))
    assert found.blob.read_bytes() == b"GGUF weights"
    assert found.projector is not None and found.projector.read_bytes() == b"GGUF projector"
    assert [adapter.read_bytes() for adapter in found.adapters] == [b"GGUF lora one", b"GGUF lora two"]
    assert found.draft is not None and found.draft.read_bytes() == b"GGUF draft"
    assert found.template == "{{ .System }} {{ .Prompt }}"
    assert found.system == "You are a pirate.\nArr."
    assert found.params == params
    assert list(found.messages) == messages
    assert found.license == ("First licence", "Second licence — ©")
    assert (found.format, found.remote_host, found.parts) == ("gguf", "", 1)
    assert found.parent == "/home/me/weights.gguf"
    assert found.config["parser"] == "qwen3"


def test_a_model_that_is_nothing_but_weights(store: Store) -> None:
    store.write("bare", [store.layer("model", b"x")])
    found = resolve(store.root, "bare")
    assert (found.template, found.system, found.params, found.messages, found.license) == (
        None, None, {}, (), ()
    )  # fmt: skip
    assert (found.projector, found.adapters, found.draft, found.parent) == (None, (), None, "")


def test_the_last_model_layer_is_the_one(store: Store) -> None:
    store.write("two", [store.layer("model", b"one"), store.layer("model", b"other")])
    found = resolve(store.root, "two")
    assert found.blob is not None and found.blob.read_bytes() == b"other"
    assert found.parts == 2


@pytest.mark.parametrize(
    ("stored", "asked", "shown"),
    [
        ("llama3.2", "LLAMA3.2:Latest", "llama3.2:latest"),
        ("Mixed/Case:Q4_K_M", "mixed/case:q4_k_m", "Mixed/Case:Q4_K_M"),
        ("hf.co/bartowski/Llama-3.2-1B:Q8_0", "HF.co/Bartowski/llama-3.2-1b:q8_0",
         "hf.co/bartowski/Llama-3.2-1B:Q8_0"),
        ("localhost:5000/me/mine:v1", "localhost:5000/me/mine:v1", "localhost:5000/me/mine:v1"),
        ("gemma3:270m", "registry.ollama.ai/library/gemma3:270m", "gemma3:270m"),
    ],
)  # fmt: skip
def test_names_in_any_case_and_layout(store: Store, stored: str, asked: str, shown: str) -> None:
    store.write("another", [store.layer("model", b"other")])
    store.write(stored, [store.layer("model", b"x")])
    found = resolve(store.root, asked)
    assert found.name == shown
    assert found.blob is not None and found.blob.read_bytes() == b"x"


def test_a_name_that_is_not_there(store: Store) -> None:
    store.write("here", [store.layer("model", b"x")])
    with pytest.raises(NotStored, match=r"gone:latest is not in the store .*; pull it first"):
        resolve(store.root, "gone")
    with pytest.raises(ValueError, match="model is required"):
        resolve(store.root, " ")


def test_an_empty_or_absent_store_holds_nothing(store: Store) -> None:
    assert models(store.root) == []
    assert scan(store.root / "nowhere").models == ()


BROKEN = {
    "cut short": b'{"schemaVersion": 2, "layers": [',
    "no object": b"[]",
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "a layer without a digest": json.dumps({"layers": [{"mediaType": "m", "size": 1}]}).encode(),
    "a layer that is a number": json.dumps({"layers": [7]}).encode(),
    "layers that are a number": json.dumps({"layers": 7}).encode(),
    "a digest that leads out": json.dumps(
        {"layers": [{"mediaType": "application/vnd.ollama.image.model", "size": 1,
                     "digest": "sha256:../../../../etc/passwd"}]}
    ).encode(),
    "a digest of another kind": json.dumps(
        {"layers": [{"mediaType": "m", "size": 1, "digest": "md5:" + "0" * 64}]}
    ).encode(),
    "a config that leads out": json.dumps({"config": {"digest": "/etc/passwd"}, "layers": []}).encode(),
    "a list of nothing": json.dumps(
        {"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": []}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_named_and_the_others_are_found(store: Store, raw: bytes) -> None:
    store.write("good", [store.layer("model", b"x")])
    store.write_raw("bad:7b", raw)
    found = scan(store.root)
    assert [model.name for model in found.models] == ["good:latest"]
    assert list(found.broken) == ["bad:7b"]
    assert found.broken["bad:7b"].startswith("bad:7b")
    with pytest.raises(NotStored, match=r"^bad:7b"):
        resolve(store.root, "bad:7b")


def test_a_manifest_that_is_no_file_does_not_hang(store: Store) -> None:
    path = store.write("pipe", [store.layer("model", b"x")])
    path.unlink()
    os.mkfifo(path)
    assert "is no file" in scan(store.root).broken["pipe:latest"]


def test_strange_things_among_the_manifests_are_passed_over(store: Store) -> None:
    path = store.write("good", [store.layer("model", b"x")])
    (path.parent / ".DS_Store").write_bytes(b"x")
    (path.parent / "-no-name").write_bytes(b"x")
    (path.parent / "directory").mkdir()
    (path.parents[1] / "README").write_text("x")
    (path.parents[1] / "loop").symlink_to(store.root / "manifests")
    assert list(manifests(store.root)) == ["good:latest"]
    assert scan(store.root).broken == {}


def test_a_manifest_may_not_lead_out_of_the_store(store: Store, tmp_path: Path) -> None:
    path = store.write("outside", [store.layer("model", b"x")])
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert "leads out of the store" in scan(store.root).broken["outside:latest"]


def test_a_store_that_is_a_link_is_a_store(store: Store, tmp_path: Path) -> None:
    store.write("linked", [store.layer("model", b"x")])
    link = tmp_path / "link"
    link.symlink_to(store.root)
    assert resolve(link, "linked").name == "linked:latest"


@pytest.mark.parametrize("kind", ["model", "projector", "adapter", "template", "license"])
def test_a_missing_file_is_named(store: Store, kind: str) -> None:
    layers = {
        name: store.layer(name, name.encode()) for name in ("model", "projector", "adapter", "template")
    }
    layers["license"] = store.layer("license", "text")
    store.write("holey", list(layers.values()))
    path = store.blob(layers[kind]["digest"].removeprefix("sha256:"))
    path.unlink()
    sentence = rf"holey:latest: its {kind} layer {path.name} is missing; pull it again"
    with pytest.raises(NotStored, match=sentence):
        resolve(store.root, "holey")
    [listed] = models(store.root)  # a list needs no more than the manifest
    if kind == "template":
        with pytest.raises(NotStored, match=r"is missing; pull it again"):
            _ = listed.template


def test_weights_that_are_cut_short_are_named(store: Store) -> None:
    layer = store.layer("model", b"all of the weights")
    store.write("cut", [layer])
    store.blob(layer["digest"].removeprefix("sha256:")).write_bytes(b"all of")
    with pytest.raises(NotStored, match="is incomplete; pull it again"):
        resolve(store.root, "cut")


def test_texts_are_bounded(store: Store) -> None:
    store.write(
        "long", [store.layer("model", b"x"), store.layer("system", "a" * (storage.MAX_TEXT_BYTES + 1))]
    )
    with pytest.raises(NotStored, match=f"has more than {storage.MAX_TEXT_BYTES} bytes"):
        _ = resolve(store.root, "long").system


@pytest.mark.parametrize("field", ["params", "messages"])
def test_damaged_json_of_a_layer_is_named(store: Store, field: str) -> None:
    store.write("damaged", [store.layer("model", b"x"), store.layer(field, "{[")])
    with pytest.raises(NotStored, match="layer is damaged; pull it again"):
        getattr(resolve(store.root, "damaged"), field)


def test_the_older_name_of_a_blob(store: Store) -> None:
    layer = store.layer("model", b"x")
    path = store.blob(layer["digest"].removeprefix("sha256:"))
    path.rename(path.with_name(path.name.replace("-", ":")))
    store.write("older", [layer])
    found = resolve(store.root, "older")
    assert found.blob is not None and found.blob.name.startswith("sha256:")


def test_safetensors_have_no_gguf(store: Store) -> None:
    layers = [store.layer("tensor", b"t"), store.layer("json", {"a": 1})]
    store.write("mlx", layers, {"model_format": "safetensors"})
    store.write("mlx-old", layers, {"x": 1})
    for name in ("mlx", "mlx-old"):
        found = resolve(store.root, name)
        assert (found.blob, found.format) == (None, "safetensors")


def test_a_cloud_model_says_where_it_runs(store: Store) -> None:
    config = {"remote_host": "https://ollama.com:443", "remote_model": "gpt-oss:120b"}
    store.write("gpt-oss:120b-cloud", [], config)
    found = resolve(store.root, "gpt-oss:120b-cloud")
    assert (found.blob, found.format, found.remote_host) == (None, "", "https://ollama.com:443")


def test_newer_stores_link_names_to_blobs_and_hide_the_older_ones(store: Store) -> None:
    old = store.write("moved", [store.layer("model", b"old")])
    raw = store.write("temporary", [store.layer("model", b"new")]).read_bytes()
    store.layer("manifest", raw)
    link = store.root / "manifests-v2/ollama.com/library/moved/latest"
    link.parent.mkdir(parents=True)
    blob = store.blob(hashlib.sha256(raw).hexdigest())
    link.symlink_to(os.path.relpath(blob, link.parent))
    found = resolve(store.root, "moved")
    assert (found.name, found.digest) == ("moved:latest", sha256(blob))
    assert found.blob is not None and found.blob.read_bytes() == b"new"
    assert found.digest != sha256(old)


@pytest.mark.parametrize("by_digest", [True, False])
def test_a_list_of_manifests_gives_the_one_for_llama_cpp(store: Store, by_digest: bool) -> None:
    layers = [store.layer("model", b"the gguf")]
    child = json.loads(store.write("child", layers).read_bytes())
    if by_digest:
        entry = store.layer("x", child)
        child = {"mediaType": child["mediaType"], "digest": entry["digest"]}
    entries = [{"runner": "mlx", "layers": []}, child | {"runner": "llamacpp"}]
    listing = {"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": entries}
    path = store.write_raw("both", json.dumps(listing).encode())
    found = resolve(store.root, "both")
    assert found.digest == sha256(path)
    assert found.blob is not None and found.blob.read_bytes() == b"the gguf"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read the store")
@pytest.mark.parametrize(("closed", "said"), [("manifests", "the store"), ("blobs", "layer sha256-")])
def test_a_store_that_may_not_be_read_says_so(tmp_path: Path, closed: str, said: str) -> None:
    # pytest's own directory is for its user only, so the store lies beside it.
    with_access = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        with_access.chmod(0o755)
        store = Store(with_access / "models")
        store.write("secret", [store.layer("model", b"x")])
        (store.root / closed).chmod(0o700)
        script = (
            "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "from pathlib import Path\nfrom agent.ollama.storage import *\n"
            "try: print(resolve(Path(sys.argv[1]), 'secret'))\n"
            "except NotStored as error: print('refused:', error)\n"
        )
        said_there = subprocess.run(
            [sys.executable, "-c", f"import agent.ollama.storage\n{script}", str(store.root)],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    finally:
        subprocess.run(["rm", "-r", str(with_access)], check=True)
    assert said_there.startswith("refused: ")
    assert said in said_there
    assert "may not be read by this user: run as the user ollama, or join its group" in said_there


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No store anywhere, a home and a systemd of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(storage, "_SERVICE_STORE", tmp_path / "service")
    monkeypatch.setattr(storage, "_UNIT_DIRECTORIES", (tmp_path / "lib", tmp_path / "etc"))
    return tmp_path


def test_where_the_store_is_looked_for(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_store() is None
    (nowhere / "service").mkdir()
    assert find_store() == nowhere / "service"
    (nowhere / ".ollama/models").mkdir(parents=True)
    assert find_store() == nowhere / ".ollama/models"
    drop_in = nowhere / "etc/ollama.service.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text('[Service]\nEnvironment="OLLAMA_MODELS=/mnt/big disk/models"\n')
    assert find_store() == Path("/mnt/big disk/models")
    monkeypatch.setenv("OLLAMA_MODELS", ' "/elsewhere" ')  # Ollama strips both as well
    assert find_store() == Path("/elsewhere")


UNITS = {
    "several on a line": ("Environment=A=1 OLLAMA_MODELS=/m B=2", "/m"),
    "quoted": ('Environment="OLLAMA_HOST=0.0.0.0" "OLLAMA_MODELS=/a b"', "/a b"),
    "value quoted": ("Environment=OLLAMA_MODELS='/a b'", "/a b"),
    "the last one wins": ("Environment=OLLAMA_MODELS=/one\nEnvironment=OLLAMA_MODELS=/two", "/two"),
    "forgotten": ("Environment=OLLAMA_MODELS=/one\nEnvironment=", None),
    "over two lines": ("Environment=A=1 \\\n  OLLAMA_MODELS=/m", "/m"),
    "commented out": ("#Environment=OLLAMA_MODELS=/m", None),
    "another": ("Environment=OLLAMA_MODELS_X=/m", None),
    "broken": ('Environment="OLLAMA_MODELS=/m', None),
    "empty": ("Environment=OLLAMA_MODELS=", None),
}


@pytest.mark.parametrize(("text", "found"), UNITS.values(), ids=UNITS)
def test_what_a_unit_sets(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "ollama.service").write_text(f"[Service]\n{text}\n")
    assert service_setting([tmp_path]) == found


def test_units_and_drop_ins_override_as_in_systemd(tmp_path: Path) -> None:
    lib, etc = tmp_path / "lib", tmp_path / "etc"
    for path, value in (
        (lib / "ollama.service", "/packaged"),
        (etc / "ollama.service.d/20-late.conf", "/late"),
        (lib / "ollama.service.d/30-hidden.conf", "/hidden"),
        (etc / "ollama.service.d/10-early.conf", "/early"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[Service]\nEnvironment=OLLAMA_MODELS={value}\n")
    (etc / "ollama.service.d/30-hidden.conf").write_text("[Service]\n")
    assert service_setting([lib, etc]) == "/late"
    (etc / "ollama.service").write_text("[Service]\n")
    for path in (etc / "ollama.service.d").iterdir():
        path.unlink()
    (lib / "ollama.service.d/30-hidden.conf").unlink()
    assert service_setting([lib, etc]) is None  # the administrator's unit hides the packaged one
