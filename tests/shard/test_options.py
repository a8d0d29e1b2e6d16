import math

import pytest

from shard.options import keep_alive_s, resolve, sampling_fields


def test_every_sampling_option_is_sent_with_ollamas_default() -> None:
    assert sampling_fields(resolve(None, 32768)) == {
        "n_predict": 40960,
        "n_keep": 4,
        "seed": -1,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_last_n": 64,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
    }


@pytest.mark.parametrize(
    ("given", "trained", "expected"),
    [(None, 32768, 4096), (0, 32768, 4096), (-1, 32768, 4096), (8192, 32768, 8192), (99999, 32768, 32768),
     (1, 32768, 4), (None, 2048, 2048), (16384, None, 16384)],
)  # fmt: skip
def test_num_ctx_stays_within_what_the_model_was_trained_for(
    given: int | None, trained: int | None, expected: int
) -> None:
    assert resolve({"num_ctx": given}, trained)["num_ctx"] == expected


@pytest.mark.parametrize(
    ("given", "trained", "num_batch"),
    [(None, 8192, 2048), (None, 512, 512), ({"num_ctx": 1024}, 8192, 1024), ({"num_batch": 64}, 8192, 64)],
)
def test_an_embedding_model_takes_a_text_in_one_batch(
    given: dict[str, int] | None, trained: int, num_batch: int
) -> None:
    assert resolve(given, trained, embeds=True)["num_batch"] == num_batch
    assert resolve(None, trained)["num_batch"] == 512


@pytest.mark.parametrize(("given", "num_batch"), [(0, 512), (-1, 512), (1, 4), (8, 8)])
def test_a_batch_is_large_enough_for_llama_server_to_start(given: int, num_batch: int) -> None:
    assert resolve({"num_batch": given}, None)["num_batch"] == num_batch


@pytest.mark.parametrize(
    ("asked", "sent"), [(-1, 5120), (-2, 5120), (5121, 5120), (5120, 5120), (0, 0), (7, 7), (7.9, 7)]
)
def test_num_predict_is_bounded(asked: float, sent: int) -> None:
    assert sampling_fields(resolve({"num_predict": asked, "num_ctx": 512}, None))["n_predict"] == sent


def test_repeat_last_n_of_the_whole_context_is_spelled_out() -> None:
    assert sampling_fields(resolve({"repeat_last_n": -1, "num_ctx": 512}, None))["repeat_last_n"] == 512


def test_unknown_and_null_options_are_ignored() -> None:
    assert resolve({"mirostat": 2, "top_k": None}, None) == resolve(None, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", "40", 'option "top_k" must be of type integer'),
        ("top_k", True, 'option "top_k" must be of type integer'),
        ("top_k", math.inf, 'option "top_k" must be of type integer'),
        ("temperature", [], 'option "temperature" must be of type float32'),
        ("stop", "a", 'option "stop" must be of type array'),
        ("stop", [1], 'option "stop" must be of an array of strings'),
    ],
)
def test_wrong_types_are_told_in_ollamas_words(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve({name: value}, None)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (0, 0), (300, 300), (1.9, 1), (-1, math.inf), (-0.5, math.inf), ("0", 0), ("5m", 300),
     ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25), ("-1s", math.inf), ("+10s", 10), ("2µs", 2e-6)],
)  # fmt: skip
def test_keep_alive(given: object, seconds: float | None) -> None:
    assert keep_alive_s(given) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("-1", 'time: missing unit in duration "-1"'),
        ("5 m", 'time: unknown unit " m" in duration "5 m"'),
        ("", 'time: invalid duration ""'),
        ("soon", 'time: invalid duration "soon"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        (True, "Unsupported type: 'bool'"),
        ([], "Unsupported type: 'list'"),
    ],
)
def test_malformed_keep_alives_are_told_in_gos_words(given: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        keep_alive_s(given)
    assert str(error.value) == message
