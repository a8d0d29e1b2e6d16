"""Every attack of the table on the real proxy: what its client sees, what the node gets."""

from __future__ import annotations

import pytest

from tests.hostile.attacks import ATTACKS, Attack
from tests.hostile.conftest import House
from tests.hostile.wire import converse

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_an_attack_ends_in_a_clear_refusal(house: House, attack: Attack) -> None:
    seen = await converse(house.proxy.port, attack.sent)
    await house.answers_well()
    assert tuple(answer.status for answer in seen.answers) == attack.answers
    assert tuple(house.reached()) == attack.reaches
    for answer in seen.answers:
        if answer.status >= 400:
            sentence = answer.sentence
            assert sentence and len(sentence) < 300 and "\n" not in sentence
            assert "mitmproxy" not in sentence and "Traceback" not in sentence
            if answer.fields["content-type"].startswith("application/json"):
                assert answer.protocol == attack.protocol
