"""Random draws belong to (seed, stream, step, place); conditioning is joined, repeated and replaced by sample."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import to_x0_eps
from lcmdistill.diffusion.random import Rng, derive_seed
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.diffusion.types import Conditioning, x0_eps_network

DRAWS: dict[str, Callable[[Rng, str], Tensor]] = {
    "normal": lambda rng, stream: rng.normal(stream, (4, 8, 8)),
    "uniform": lambda rng, stream: rng.uniform(stream),
    "integers": lambda rng, stream: rng.integers(stream, 2**40),
}

each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@each_draw
def test_two_halves_make_the_whole(draw: Callable[[Rng, str], Tensor]) -> None:
    whole = draw(Rng(seed=1, step=7, places=range(8)), "noise")
    halves = [draw(Rng(seed=1, step=7, places=places), "noise") for places in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(draw(Rng(seed=1, step=7, places=[5, 2]), "noise"), whole[[5, 2]])


@each_draw
def test_a_draw_can_be_repeated_and_leaves_global_state_alone(draw: Callable[[Rng, str], Tensor]) -> None:
    rng, state = Rng(seed=1, step=7, places=range(4)), torch.get_rng_state()
    assert torch.equal(draw(rng, "noise"), draw(rng, "noise"))
    assert torch.equal(torch.get_rng_state(), state)


@each_draw
def test_seeds_steps_streams_and_places_differ(draw: Callable[[Rng, str], Tensor]) -> None:
    draws = [
        draw(Rng(seed, step, range(4)), stream)
        for seed in (0, 1)
        for step in (0, 1, 10)
        for stream in ("noise", "times", "omega")
    ]
    samples = torch.cat(draws).flatten(1) if draws[0].dim() > 1 else torch.cat(draws)[:, None]
    assert len(samples.unique(dim=0)) == len(samples) == 2 * 3 * 3 * 4


def test_draws_have_their_distributions() -> None:
    rng = Rng(seed=0, step=0, places=range(2000))
    normal, uniform, integers = rng.normal("a", (4, 4)), rng.uniform("b"), rng.integers("c", 10)
    assert (normal.shape, uniform.shape, integers.shape) == ((2000, 4, 4), (2000,), (2000,))
    # within 5 standard errors
    assert abs(normal.mean().item()) < 5 / 32000**0.5
    assert normal.var().item() == pytest.approx(1, abs=5 * (2 / 32000) ** 0.5)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / 2000) ** 0.5)
    assert (integers.bincount(minlength=10) - 200).abs().max() < 5 * 180**0.5
    assert len(integers.bincount()) == 10


def test_derived_seeds_are_the_same_in_every_process() -> None:
    assert derive_seed(0, "noise", 0, 0) == 8555164854787981315
    assert 0 <= derive_seed(1) < 2**63
    assert derive_seed(1, 12) != derive_seed(11, 2)


def prompts(*values: float) -> Conditioning:
    return Conditioning(
        {"prompt_embeds": torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).expand(-1, 3, 2).clone()}
    )


def values(c: Conditioning) -> list[float]:
    return c["prompt_embeds"][:, 0, 0].tolist()


def test_conditioning_is_joined_repeated_and_replaced() -> None:
    assert values(prompts(1, 2).cat(prompts(3))) == [1, 2, 3]
    assert values(prompts(7).expand(3)) == [7, 7, 7]
    mask = torch.tensor([False, True, False])
    assert values(prompts(1, 2, 3).replace_where(mask, prompts(0))) == [1, 0, 3]
    assert prompts(1, 2, 3).replace_where(mask, prompts(0))["prompt_embeds"].shape == (3, 3, 2)


def test_another_prompt_leaves_what_it_does_not_name() -> None:
    size = torch.tensor([[64.0, 96.0], [32.0, 32.0]])
    cond = Conditioning({**prompts(1, 2).values, "time_ids": size})
    other = cond.with_prompt(prompts(9))
    assert values(other) == [9, 9]
    assert torch.equal(other["time_ids"], size)
    dropped = cond.replace_where(torch.tensor([True, False]), prompts(9))
    assert values(dropped) == [9, 2]
    assert torch.equal(dropped["time_ids"], size)
    assert values(cond.cat(other)) == [1, 2, 9, 9]


def test_whole_numbers_keep_their_dtype() -> None:
    labels = Conditioning({"class_labels": torch.tensor([3, 4])}).to("cpu", torch.bfloat16)
    assert labels["class_labels"].dtype == torch.int64
    assert Conditioning({}).cat(Conditioning({})).with_prompt(Conditioning({})).values == {}


def test_conditioning_keeps_the_dtype_of_its_first() -> None:
    half = prompts(1).to("cpu", torch.bfloat16)
    assert half["prompt_embeds"].dtype == torch.bfloat16
    assert half.to("cpu")["prompt_embeds"].dtype == torch.bfloat16
    assert half.cat(prompts(2))["prompt_embeds"].dtype == torch.bfloat16
    assert half.replace_where(torch.tensor([True]), prompts(2))["prompt_embeds"].dtype == torch.bfloat16


def test_a_network_is_adapted_at_its_own_noise_level() -> None:
    schedule, t = vp_schedule({}), torch.tensor([10, 990])
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = x0_eps_network(lambda z, t, c, w: z * c["prompt_embeds"][:, :1, :1, None], schedule, "v_prediction")
    found = network(z, t, prompts(0.5, 2), None)
    output = z * torch.tensor([0.5, 2.0]).view(-1, 1, 1, 1)
    expected = to_x0_eps(output, z, schedule.alpha(t), schedule.sigma(t), "v_prediction")
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.eps, expected.eps)
