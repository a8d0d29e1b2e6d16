"""Headers in one go say what mitmproxy's own say one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy import http

from proxy_addon import heads

NAMES = st.sampled_from([b"Host", b"host", b"X-A", b"x-a", b"x-B", b"Content-Type"])
VALUES = st.binary(max_size=8)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)


@given(FIELDS)
def test_what_is_read_is_what_mitmproxy_reads(fields: list[tuple[bytes, bytes]]) -> None:
    headers = http.Headers(fields)
    assert heads.read(headers.fields) == {name.lower(): headers[name] for name in headers}


@given(FIELDS, st.dictionaries(st.sampled_from(["host", "x-a", "x-new"]), st.text(max_size=8), max_size=3))
def test_what_is_put_is_what_mitmproxy_sets(fields: list[tuple[bytes, bytes]], new: dict[str, str]) -> None:
    ours, theirs = http.Headers(fields), http.Headers(fields)
    heads.put(ours, new)
    for name, value in new.items():
        theirs[name] = value
    assert ours.fields == theirs.fields


@pytest.mark.parametrize(
    ("fields", "value"),
    [((), ""), (((b"a", b"1"),), ""), (((b"Content-Type", b"x"), (b"content-type", b"y")), "x")],
)
def test_the_first_of_a_name(fields: tuple[tuple[bytes, bytes], ...], value: str) -> None:
    assert heads.first(http.Headers(fields), b"content-type") == value
