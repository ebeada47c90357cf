"""A served teacher says what the same model says in process, or says what is wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_server import Handler, World, serving
from small_gemma import CONFIG, small_gemma

from cabochon.core import TokenBatch, TopKTargets
from cabochon.core.errors import ConfigError, ServerError, TokenizerMismatch
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.data.truncation import top_k
from cabochon.generation.remote import Endpoint
from cabochon.generation.teacher import ECHO, SAMPLE, connect, served, served_logprob
from cabochon.generation.vllm import VLLM

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

V = CONFIG.vocab_size
K = 7


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=["prompt_logprobs", "echo"])
def endpoint(world: World, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    dialect = VLLM if request.param == "prompt_logprobs" else ECHO
    with serving(world, attempts=2) as transport:
        yield Endpoint(transport=transport, model="small", dialect=dialect)


def batch() -> TokenBatch:
    random = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, V, (length,), generator=random) for length in (9, 4, 12)]
    plain = TokenBatch.of(rows)
    mask = plain.mask.clone()
    mask[0, :3] = mask[2, 8:] = False
    return replace(plain, mask=mask)


def altered(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], Any]:
    def alter(answer: dict[str, Any]) -> Any:
        for choice in answer["choices"]:
            change(choice)
        return answer

    return alter


# --- the same numbers ---


def test_it_says_what_the_model_says_in_process(endpoint: Endpoint) -> None:
    asked = batch()
    found = served(endpoint, K, V)(asked)
    expected = top_k(small_gemma(), K)(asked)
    assert isinstance(found, TopKTargets)
    assert isinstance(expected, TopKTargets)
    mask = asked.mask
    assert torch.equal(found.ids[mask], expected.ids[mask])
    torch.testing.assert_close(found.logprob[mask], expected.logprob[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.tail[mask], expected.tail[mask], atol=1e-4, rtol=0)
    assert torch.equal(found.tail.isnan(), ~mask)
    assert (found.ids[~mask] == -1).all()


def test_documents_that_share_a_row_are_asked_for_one_by_one(world: World) -> None:
    with serving(world) as transport:
        endpoint = Endpoint(transport=transport, model="small", dialect=VLLM)
        asked = batch()
        alone = served(endpoint, K, V)(asked)
        flat = {
            name: value.flatten()[asked.documents.flatten() >= 0][None]
            for name, value in vars(asked).items()
        }
        numbers = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 4, 12]))[None]
        together = served(endpoint, K, V)(TokenBatch(**{**flat, "documents": numbers}))
    kept = alone.tail[asked.documents >= 0]  # type: ignore[union-attr]
    torch.testing.assert_close(together.tail[0], kept, equal_nan=True)  # type: ignore[union-attr]


def test_the_whole_vocabulary_leaves_no_tail(endpoint: Endpoint) -> None:
    asked = batch()
    found = served(endpoint, V, V)(asked)
    assert isinstance(found, TopKTargets)
    assert (found.tail[asked.mask] == -math.inf).all()


def test_a_tail_below_the_rounding_is_never_taken_for_none(world: World) -> None:
    def sure(choice: dict[str, Any]) -> None:
        for entry in choice["prompt_logprobs"][1:]:
            for place, value in enumerate(entry.values()):
                value["logprob"] = 0.0 if place == 0 else -40.0 - place

    world.alter = altered(sure)
    with serving(world) as transport:
        teacher = served(Endpoint(transport=transport, model="small", dialect=VLLM), K, V)
        asked = batch()
        found = teacher(asked)
    assert isinstance(found, TopKTargets)
    expected = math.log(V - K) - 40.0
    assert found.tail[asked.mask].isfinite().all()
    assert found.tail[asked.mask].max().item() == pytest.approx(expected, abs=K)


def test_log_probabilities_of_the_targets_alone(endpoint: Endpoint) -> None:
    asked = batch()
    found = served_logprob(endpoint)(asked)
    law = small_gemma()(asked).logits(slice(None)).log_softmax(-1).view(*asked.shape, V)
    expected = law.gather(-1, asked.targets[..., None]).squeeze(-1)
    torch.testing.assert_close(found[asked.mask], expected[asked.mask], atol=1e-5, rtol=0)
    assert torch.equal(found.isnan(), ~asked.mask)


def test_nothing_to_predict_asks_nothing(world: World, endpoint: Endpoint) -> None:
    silent = replace(batch(), mask=torch.zeros(3, 12, dtype=torch.bool))
    found = served(endpoint, K, V)(silent)
    assert isinstance(found, TopKTargets)
    assert found.tail.isnan().all()
    assert world.calls == []


# --- what can go wrong ---


def test_a_server_that_does_not_answer_in_time(world: World) -> None:
    world.faults = [lambda _: time.sleep(1.0)] * 8
    with serving(world, timeout_s=0.2, attempts=2, longest_wait_s=0.0) as transport:
        teacher = served(Endpoint(transport=transport, model="small", dialect=VLLM), K, V)
        with pytest.raises(ServerError, match=r"no answer within 0.2 s .*raise timeout_s"):
            teacher(batch())


def fewer(choice: dict[str, Any]) -> None:
    if "prompt_logprobs" in choice:
        entry = choice["prompt_logprobs"][5]
        choice["prompt_logprobs"][5] = dict(list(entry.items())[-2:])
    else:
        top = choice["logprobs"]["top_logprobs"][5]
        choice["logprobs"]["top_logprobs"][5] = dict(list(top.items())[:2])


def wrong_count(choice: dict[str, Any]) -> None:
    for values in (choice.get("prompt_logprobs"), choice["logprobs"]["tokens"]):
        if values:
            values.pop()


def not_a_number(choice: dict[str, Any]) -> None:
    if "prompt_logprobs" in choice:
        next(iter(choice["prompt_logprobs"][3].values()))["logprob"] = math.nan
    else:
        tops = choice["logprobs"]["top_logprobs"][3]
        tops[next(iter(tops))] = math.nan


def too_much(choice: dict[str, Any]) -> None:
    if "prompt_logprobs" in choice:
        for value in choice["prompt_logprobs"][6].values():
            value["logprob"] = -0.1
    else:
        given = choice["logprobs"]
        given["top_logprobs"][6] = dict.fromkeys(given["top_logprobs"][6], -0.1)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (fewer, rf"asked for the {K} most probable, got [23] at 5"),
        (wrong_count, r"asked to score \d+ tokens, got"),
        (not_a_number, r"score of token \d+ at 3 is .*nan"),
        (too_much, r"probabilities add up to .* at a position"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(
    world: World, endpoint: Endpoint, harm: Callable[[dict[str, Any]], None], says: str
) -> None:
    world.alter = altered(harm)
    with pytest.raises(ServerError, match=says):
        served(endpoint, K, V)(TokenBatch.of([list(range(3, 12))]))


def test_more_than_the_server_gives_is_refused_with_its_own_words(
    world: World, endpoint: Endpoint
) -> None:
    world.max_logprobs = 5
    with pytest.raises(ServerError, match="more log-probabilities than max_logprobs 5"):
        served(endpoint, K, V)(batch())


@pytest.mark.parametrize("k", [0, V + 1])
def test_a_k_that_cannot_be_is_refused(endpoint: Endpoint, k: int) -> None:
    with pytest.raises(ConfigError, match="1 to 61 tokens"):
        served(endpoint, k, V)


# --- finding out what is there ---


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["two words, and then some more of them (x_y); " * 4], 300)


def reading(tokenizer: Tokenizer) -> World:
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, context=256)
    return World(model=small_gemma(config), tokenizer=tokenizer)


def no_prompt_logprobs(choice: dict[str, Any]) -> None:
    choice.pop("prompt_logprobs", None)


def test_a_server_is_taken_for_what_it_can_do(tokenizer: Tokenizer) -> None:
    world = reading(tokenizer)
    with serving(world) as transport:
        endpoint = connect(transport, tokenizer.encode)
        assert (endpoint.dialect, endpoint.model, endpoint.context) == (VLLM, "small", 256)
        world.alter = altered(no_prompt_logprobs)
        echoing = connect(transport, tokenizer.encode, model="small")
        assert echoing.dialect == ECHO
        asked = TokenBatch.of([tokenizer.encode("some words", bos=True, eos=True)])
        found = served(echoing, K, tokenizer.vocab_size)(asked)
    assert isinstance(found, TopKTargets)
    expected = top_k(world.model, K)(asked)
    assert isinstance(expected, TopKTargets)
    mask = asked.mask
    torch.testing.assert_close(found.logprob[mask], expected.logprob[mask], atol=1e-5, rtol=0)


def test_a_server_that_reads_text_as_other_tokens_is_refused(tokenizer: Tokenizer) -> None:
    other = train_tokenizer(["another text altogether, with other merges in it " * 4], 300)
    with (
        serving(reading(other)) as transport,
        pytest.raises(TokenizerMismatch, match=r"from token \d+ on they are"),
    ):
        connect(transport, tokenizer.encode)
    assert other.encode(SAMPLE) != tokenizer.encode(SAMPLE)


def test_a_server_that_scores_no_prompts_is_refused(tokenizer: Tokenizer) -> None:
    world = reading(tokenizer)

    def nothing(choice: dict[str, Any]) -> None:
        no_prompt_logprobs(choice)
        choice["logprobs"] = None

    world.alter = altered(nothing)
    with (
        serving(world) as transport,
        pytest.raises(ServerError, match="does not return the log-probabilities of a prompt"),
    ):
        connect(transport, tokenizer.encode)


def test_a_model_that_is_not_served_is_refused(tokenizer: Tokenizer) -> None:
    with serving(reading(tokenizer)) as transport, pytest.raises(ConfigError, match="is none of"):
        connect(transport, tokenizer.encode, model="large")


def test_a_server_that_is_not_there(tokenizer: Tokenizer) -> None:
    with serving(World()) as transport:
        pass
    with pytest.raises(ServerError, match="is the server up"):
        connect(replace(transport, attempts=1), tokenizer.encode)


def hang(handler: Handler) -> None:
    handler.close_connection = True


def test_a_broken_connection_is_tried_again(world: World, endpoint: Endpoint) -> None:
    world.faults = [hang]
    assert served(endpoint, K, V)(batch()) is not None
