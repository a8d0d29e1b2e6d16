"""The bootstrap's choice of a Python, on interpreters that are small shell scripts of our own."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bootstrap.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load()


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def interpreter(
    path: Path, major: int, minor: int, *, level: str = "final", implementation: str = "CPython"
) -> Path:
    answer = json.dumps([str(path), [major, minor], level, implementation])
    return script(path, f"echo '{answer}'")


def shim(path: Path) -> Path:
    """A shim as pyenv leaves it for a version that is installed but not chosen."""
    return script(path, 'echo "pyenv: command not found" >&2\nexit 127')


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def found_path(home: Path, *folders: Path, **more: str) -> str | None:
    environ = {"HOME": str(home), "PATH": ":".join(map(str, folders)), **more}
    found = bootstrap.find_python(environ)
    return found.path if found else None


def test_the_python_that_runs_this_test_answers_the_probe_truthfully() -> None:
    found = bootstrap.probe(sys.executable)
    assert found.version == sys.version_info[:2]
    assert found.final is (sys.version_info.releaselevel == "final")
    assert found.cpython is (sys.implementation.name == "cpython")
    assert Path(found.path).samefile(sys.executable)


def test_python_3_13_is_preferred_wherever_on_path_it_stands(home: Path, tmp_path: Path) -> None:
    interpreter(tmp_path / "a" / "python3", 3, 12)
    wanted = interpreter(tmp_path / "b" / "python3", 3, 13)
    interpreter(tmp_path / "c" / "python3.13", 3, 13)
    assert found_path(home, tmp_path / "a", tmp_path / "b", tmp_path / "c") == str(wanted)


def test_a_failing_shim_is_passed_over_without_a_word(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shim(tmp_path / "shims" / "python3.13")
    shim(tmp_path / "shims" / "python3")
    wanted = interpreter(tmp_path / "bin" / "python3.12", 3, 12)
    assert found_path(home, tmp_path / "shims", tmp_path / "bin") == str(wanted)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["PYENV_ROOT", "HOME"])
def test_a_version_of_pyenvs_is_taken_where_path_has_none(home: Path, tmp_path: Path, how: str) -> None:
    root = home / ".pyenv" if how == "HOME" else tmp_path / "elsewhere"
    shim(root / "shims" / "python3.13")
    interpreter(root / "versions" / "3.11.7" / "bin" / "python", 3, 11)
    interpreter(root / "versions" / "3.12.1" / "bin" / "python", 3, 12)
    wanted = interpreter(root / "versions" / "3.13.0" / "bin" / "python", 3, 13)
    more = {} if how == "HOME" else {"PYENV_ROOT": str(root)}
    assert found_path(home, root / "shims", **more) == str(wanted)


def test_path_comes_before_pyenv_even_with_the_older_version(home: Path, tmp_path: Path) -> None:
    interpreter(home / ".pyenv" / "versions" / "3.13.0" / "bin" / "python", 3, 13)
    wanted = interpreter(tmp_path / "bin" / "python3", 3, 12)
    assert found_path(home, tmp_path / "bin") == str(wanted)


@pytest.mark.parametrize(
    ("major", "minor", "level", "implementation"),
    [
        (3, 11, "final", "CPython"),
        (3, 14, "final", "CPython"),
        (3, 13, "candidate", "CPython"),
        (3, 13, "final", "PyPy"),
        (2, 7, "final", "CPython"),
    ],
)
def test_what_the_packages_have_no_wheels_for_is_refused(
    home: Path, tmp_path: Path, major: int, minor: int, level: str, implementation: str
) -> None:
    interpreter(tmp_path / "bin" / "python3", major, minor, level=level, implementation=implementation)
    assert found_path(home, tmp_path / "bin") is None


@pytest.mark.parametrize("body", ["echo nonsense", "exit 1", "kill -9 $$", "echo '[1, 2]'"])
def test_what_is_no_python_is_passed_over(home: Path, tmp_path: Path, body: str) -> None:
    script(tmp_path / "bin" / "python3.13", body)
    assert found_path(home, tmp_path / "bin") is None


def test_one_sentence_says_that_no_python_can_be_had(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pin = bootstrap.UV_LOCK.read_text().partition("uv==")[2].split()[0]
    asked = tmp_path / "asked"
    fake_uv = f'[ "$1" = --version ] && echo "uv {pin}" && exit\necho "$@" > {asked}\necho noise >&2\nexit 2'
    monkeypatch.setattr(bootstrap, "UV", script(tmp_path / "uv", fake_uv))
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / "venv")
    monkeypatch.setattr(bootstrap, "SCRATCH", tmp_path / "scratch")
    shim(tmp_path / "bin" / "python3.13")
    # The scripts above still need the system's sh; none of its Pythons is where PATH leads.
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    assert bootstrap.main([]) == 1
    assert asked.read_text().split()[-3:] == ["--python", "3.13", str(tmp_path / "venv")]
    out, err = capfd.readouterr()
    assert out == "sollol: no Python 3.13 or 3.12 on PATH or in pyenv: asking uv for 3.13\n"
    assert err.startswith("sollol: SOLLOL needs Python 3.13 or 3.12")
    assert err.count("\n") == 1 and "noise" not in err
