"""Whose request it is, and how urgent."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.admission.priority import client_of, priority, strip_keys
from proxy_addon.ask import BadRequest
from proxy_addon.settings import Admission, ClientClass, SettingsError, load

APP = ClientClass.model_validate({"name": "app", "key": "secret", "priority": 3, "max_priority": 8})
LAB = ClientClass.model_validate({"name": "lab", "networks": "10.1.0.0/16", "priority": "high"})
BOTH = ClientClass.model_validate({"name": "both", "key": "other", "networks": "10.2.0.0/16"})
CLASSES = (APP, LAB, BOTH)


@pytest.mark.parametrize(
    ("headers", "address", "name", "of"),
    [
        ({"authorization": "Bearer secret"}, "1.2.3.4", "app", APP),
        ({"authorization": "bearer  secret "}, "1.2.3.4", "app", APP),
        ({"x-api-key": "secret"}, "10.1.0.1", "app", APP),  # the first class that fits
        ({"authorization": "Basic secret"}, "1.2.3.4", "1.2.3.4", None),
        ({"authorization": "secret"}, "1.2.3.4", "1.2.3.4", None),
        ({"authorization": "Bearer secret2"}, "1.2.3.4", "1.2.3.4", None),
        ({"authorization": "Bearer sécret"}, "1.2.3.4", "1.2.3.4", None),
        ({"authorization": "Bearer secr\udce9t"}, "1.2.3.4", "1.2.3.4", None),
        ({}, "10.1.2.3", "10.1.2.3", LAB),
        ({}, "::ffff:10.1.2.3", "::ffff:10.1.2.3", LAB),
        ({"x-api-key": "other"}, "1.2.3.4", "both", BOTH),
        ({}, "10.2.0.1", "10.2.0.1", BOTH),
        ({}, "fd00::1", "fd00::1", None),
        ({}, "", "", None),
    ],
)
def test_whose_request_it_is(
    headers: dict[str, str], address: str, name: str, of: ClientClass | None
) -> None:
    client = client_of(headers, address, CLASSES)
    assert (client.name, client.of) == (name, of)


def test_our_keys_are_stripped_and_others_stay() -> None:
    headers = {"authorization": "Bearer secret", "x-api-key": "somebody's", "accept": "*/*"}
    strip_keys(headers, CLASSES)
    assert headers == {"x-api-key": "somebody's", "accept": "*/*"}


@pytest.mark.parametrize(
    ("body", "header", "of", "wanted"),
    [
        ({}, None, None, 5),
        ({"priority": 7}, None, None, 6),  # the settings' cap
        ({"priority": "Batch"}, None, None, 1),
        ({"priority": "3"}, None, None, 3),
        ({"priority": None}, "low", None, 3),
        ({"priority": 2}, "high", None, 2),
        ({}, "high", None, 6),
        ({}, None, APP, 3),
        ({}, "normal", APP, 5),
        ({"priority": "critical"}, None, APP, 8),
        ({}, None, BOTH, 5),
        ({}, None, LAB, 8),
    ],
)
def test_how_urgent_it_is(
    body: dict[str, Any], header: str | None, of: ClientClass | None, wanted: int
) -> None:
    headers = {} if header is None else {"x-sollol-priority": header}
    assert priority(body, headers, of, Admission(max_priority=6)) == wanted


@pytest.mark.parametrize("wrong", [0, 11, -1, 1.5, True, "", "urgent", "12", "9" * 5000, [], {}])
def test_what_is_none(wrong: Any) -> None:
    with pytest.raises(BadRequest) as bad:
        priority({"priority": wrong}, {}, None, Admission())
    assert bad.value.status == 400
    assert bad.value.message.startswith(
        "priority should be 1 to 10, or one of critical, high, normal, low, batch, not "
    )
    assert len(bad.value.message) < 140


@pytest.mark.parametrize(
    "clients",
    [
        "[{name: a, key: [hush]}]",
        "[{name: a, key: hush, weight: much}]",
        "[{name: a, key: hush, colour: red}]",
        "[{key: hush}]",
        "[{name: '', key: hush}]",
        "{name: a, key: hush}",
        "[[name, hush]]",
        "[hush]",
        "hush",
    ],
)
def test_no_error_of_the_settings_shows_a_key(clients: str, tmp_path: Any) -> None:
    path = tmp_path / "sollol.yaml"
    path.write_text(f"clients: {clients}\n")
    with pytest.raises(SettingsError) as wrong:
        load(path, {})
    assert "clients" in str(wrong.value)
    assert "hush" not in str(wrong.value)
