"""vLLM over HTTP: a real Gemma behind a server that speaks its API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_server import World, serving
from small_gemma import CONFIG, random_prompts, small_gemma

from cabochon.core import Key
from cabochon.core.errors import ConfigError, ServerError
from cabochon.generation import remote, vllm
from cabochon.generation.engine import Settings
from cabochon.generation.score import score
from cabochon.generation.transport import Transport
from cabochon.models.gemma.decoder import Gemma

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

SETTINGS = Settings(max_new_tokens=12, stop_ids=(7, 9, 11))
CUT = replace(SETTINGS, temperature=1.7, top_k=9, top_p=0.8)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def transport(world: World) -> Iterator[Transport]:
    with serving(world) as transport:
        yield transport


def other_gemma() -> Gemma:
    model = small_gemma()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)
    return model


@pytest.mark.parametrize(
    "settings", [SETTINGS, CUT, replace(SETTINGS, temperature=0.0)], ids=["plain", "cut", "greedy"]
)
def test_its_samples_have_the_log_probabilities_that_the_model_gives_them(
    transport: Transport, settings: Settings
) -> None:
    endpoint = vllm.connect(transport)
    assert (endpoint.model, endpoint.context) == ("small", CONFIG.context)
    groups = remote.generate(endpoint, random_prompts(3, 11, 7), settings, Key(1), 3)
    model = small_gemma()
    how = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    drawn = score(model, groups, **how) if settings.temperature else score(model, groups)
    for group, logprobs, model_logprobs in zip(groups, drawn, score(model, groups), strict=True):
        assert len(group.completions) == 3
        for place, found in enumerate(group.completions):
            torch.testing.assert_close(found.logprob, logprobs[place], atol=1e-4, rtol=0)
            torch.testing.assert_close(
                found.model_logprob, model_logprobs[place], atol=1e-4, rtol=0
            )
            ended = int(found.tokens[-1]) in settings.stop_ids
            assert found.stopped == ended
            assert found.stopped or len(found.tokens) == 12


def test_a_seed_belongs_to_a_prompt_and_not_to_its_neighbours(transport: Transport) -> None:
    endpoint, prompts = vllm.connect(transport), random_prompts(3, 11, 7)
    together = remote.sampler(endpoint, SETTINGS, 2)(prompts, Key(1))
    (again,) = remote.generate(endpoint, prompts[2:], SETTINGS, Key(1), 2, indices=[2])
    tokens = [[c.tokens.tolist() for c in group.completions] for group in (together[2], again)]
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1]


def test_a_completion_stays_within_the_context(transport: Transport) -> None:
    (group,) = remote.generate(vllm.connect(transport), random_prompts(61), SETTINGS, Key(4))
    assert len(group.completions[0].tokens) <= 3


def test_it_scores_given_completions_and_tells_the_most_probable(transport: Transport) -> None:
    endpoint, model = vllm.connect(transport), small_gemma()
    groups = remote.generate(endpoint, random_prompts(3, 11), SETTINGS, Key(1), 2)
    scored = remote.score(endpoint, groups, top_k=4)
    for group, scores, expected in zip(groups, scored, score(model, groups), strict=True):
        for found, logprob, completion in zip(scores, expected, group.completions, strict=True):
            torch.testing.assert_close(found.logprob, logprob, atol=1e-4, rtol=0)
            assert found.top_ids.shape == (len(completion.tokens), 4)
            inside = found.top_ids == completion.tokens[:, None]
            rows = inside.any(1)
            torch.testing.assert_close(found.top_logprob[inside], found.logprob[rows])
            assert bool((found.top_logprob.diff(dim=1) <= 0).all())
            assert bool((found.top_logprob.exp().sum(1) <= 1 + 1e-5).all())
    (plain, _), _ = remote.score(endpoint, groups)
    assert plain.top_ids.shape == (len(plain.logprob), 0)


def test_a_server_with_raw_log_probabilities_is_found_out(
    world: World, transport: Transport
) -> None:
    world.processed = False
    endpoint = vllm.connect(transport)
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        remote.generate(endpoint, random_prompts(3), CUT, Key(0))
    groups = remote.generate(endpoint, random_prompts(3), SETTINGS, Key(0))
    torch.testing.assert_close(
        groups[0].completions[0].logprob, score(small_gemma(), groups)[0][0], atol=1e-4, rtol=0
    )


def test_new_weights_are_what_it_writes_with_from_then_on(
    world: World, transport: Transport, tmp_path: Path
) -> None:
    endpoint, prompts = vllm.connect(transport), random_prompts(3, 5)
    new = other_gemma()
    before = remote.generate(endpoint, prompts, SETTINGS, Key(1))
    vllm.publish(transport, new, tmp_path, version="step-1")
    after = remote.generate(endpoint, prompts, SETTINGS, Key(1))
    steps = [path for path in world.paths() if not path.startswith("v1/")]
    assert steps == [
        "weight_info", "pause", "collective_rpc", "reset_prefix_cache", "update_weight_version",
        "resume",
    ]  # fmt: skip
    assert vllm.weight_version(transport) == "step-1"
    assert not vllm.is_paused(transport)
    for groups, model in ((before, small_gemma()), (after, new)):
        found = torch.cat([group.completions[0].logprob for group in groups])
        expected = torch.cat([each[0] for each in score(model, groups)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    (tmp_path / "something else").mkdir()
    vllm.publish(transport, small_gemma(), tmp_path, version="step-2", seen_as=f"{tmp_path}/")
    assert {each.name for each in tmp_path.iterdir()} == {"step-2", "something else"}
    assert vllm.weight_version(transport) == "step-2"


def test_a_failed_update_leaves_the_server_paused_and_says_so(
    world: World, transport: Transport, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match=r"no weights at .*stays paused") as caught:
        vllm.reload(transport, str(tmp_path / "absent"), version="x")
    assert caught.value.status == 500
    assert world.paths().count("collective_rpc") == 1
    assert vllm.is_paused(transport)
    assert vllm.weight_version(transport) == "default"
    with pytest.raises(ConfigError, match="cannot name a folder"):
        vllm.publish(transport, small_gemma(), tmp_path, version="../x")


def test_without_the_development_mode_nothing_is_touched_and_the_message_helps(
    world: World, transport: Transport
) -> None:
    world.development = False
    with pytest.raises(ServerError, match=r"404.*VLLM_SERVER_DEV_MODE=1"):
        vllm.reload(transport, "/anywhere", version="x")
    assert world.paths() == ["weight_info"]
    assert vllm.server_version(transport) == "0.33.0"


def test_the_four_phases_in_order(world: World, transport: Transport) -> None:
    assert vllm.world_size(transport) == 2
    vllm.init_weight_transfer(transport, {"master_port": 1})
    with vllm.weight_update(transport, version="step-3"):
        assert vllm.is_paused(transport)
        vllm.update_weights(transport, {"names": ["w"]})
    assert world.calls[1:] == [
        ("init_weight_transfer_engine", {"init_info": {"master_port": 1}}),
        ("pause", {"mode": ["wait"]}),
        ("start_weight_update", {}),
        ("is_paused", {}),
        ("update_weights", {"update_info": {"names": ["w"]}}),
        ("finish_weight_update", {"weight_version": "step-3"}),
        ("reset_prefix_cache", {}),
        ("resume", {}),
    ]
    with pytest.raises(RuntimeError, match="lost"), vllm.weight_update(transport, version="x"):
        raise RuntimeError("lost")
    assert vllm.is_paused(transport)
    assert vllm.weight_version(transport) == "step-3"


def test_it_sleeps_and_wakes_part_by_part(world: World, transport: Transport) -> None:
    vllm.sleep(transport, 2)
    assert vllm.is_sleeping(transport)
    vllm.wake_up(transport, ["weights"])
    vllm.wake_up(transport)
    assert not vllm.is_sleeping(transport)
    assert ("sleep", {"level": ["2"]}) in world.calls
    assert ("wake_up", {"tags": ["weights"]}) in world.calls
    assert ("wake_up", {}) in world.calls


def test_only_a_model_that_is_served_can_be_asked_for(transport: Transport) -> None:
    assert vllm.connect(transport, model="small").model == "small"
    with pytest.raises(ConfigError, match=r"serves \['small'\].*'large' is none"):
        vllm.connect(transport, model="large")
