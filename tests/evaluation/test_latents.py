"""Latents and KID: closed forms, known orders, and independence of the batch size."""

from pathlib import Path

import pytest
import torch

from lcmdistill.evaluation import latents as sampled
from lcmdistill.evaluation.metrics import features
from lcmdistill.evaluation.metrics.basic import latent_rmse
from lcmdistill.evaluation.metrics.features import kid
from lcmdistill.teachers.loading import load_teacher
from tests.support.pixel_models import LABELS, build_pixel

PROMPTS = ["a red apple", "a blue car", "a green tree"]


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images in [0, 1]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_rmse_is_the_root_of_the_mean_square():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert latent_rmse(a, a) == 0
    assert latent_rmse(a, a + torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5)


def test_kid_is_the_unbiased_polynomial_mmd():
    x, y = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 7))
    y = y[:6]

    def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 5 + 1) ** 3

    def off_diagonal(m: torch.Tensor) -> torch.Tensor:
        return (m.sum() - m.diagonal().sum()) / (6 * 5)

    expected = off_diagonal(k(x, x)) + off_diagonal(k(y, y)) - 2 * k(x, y).mean()
    assert kid(x, y) == pytest.approx(float(expected))


@pytest.mark.slow
def test_kid_with_the_bundled_features_orders_distortions():
    network = features.MobileNetV2Features()
    real = features.features_of(network, images(48))
    same = kid(features.features_of(network, images(48, seed=1)), real)
    noise = torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    slight, gross = (
        kid(features.features_of(network, (images(48, seed=1) + level * noise).clamp(0, 1)), real)
        for level in (0.05, 0.5)
    )
    assert same < slight < gross
    assert real.shape == (48, 1280)


def test_start_noise_of_an_image_does_not_depend_on_how_many_there_are(small_teacher: Path):
    teacher = load_teacher(str(small_teacher))
    few, many = (sampled.start_noise(teacher, 16, n, seed=3) for n in (2, 5))
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])


def test_latents_do_not_depend_on_the_batch_size(small_teacher: Path, small_run: Path):
    from lcmdistill.sampling.generate import load_student
    from lcmdistill.utils.device import pick_device

    teacher, student = load_teacher(str(small_teacher)), load_student(str(small_run / "pipeline"), pick_device("cpu"))
    noise = sampled.start_noise(teacher, 16, 3, seed=0)
    for generate in (
        lambda n: sampled.teacher_latents(teacher, PROMPTS, noise, steps=3, guidance_scale=4.0, batch_size=n),
        lambda n: sampled.student_latents(student, PROMPTS, noise, steps=2, guidance_scale=4.0, seed=0, batch_size=n),
    ):
        assert torch.allclose(generate(1), generate(3), atol=1e-4)
        assert generate(3).shape == noise.shape


def test_an_untrained_student_without_guidance_is_the_unguided_teacher(small_teacher: Path):
    """Omega has no effect before training: one LCM step from T - 1 is the teacher's own x0 there."""
    from lcmdistill.sampling.student_pipeline import student_pipeline
    from lcmdistill.students.full import full_student

    teacher = load_teacher(str(small_teacher))
    student = student_pipeline(teacher, full_student(teacher.network, "zero", 0).eval())
    noise = sampled.start_noise(teacher, 16, 2, seed=0)
    latents = sampled.student_latents(student, PROMPTS[:2], noise, steps=1, guidance_scale=6.0, seed=0)
    t = torch.full((2,), 999)
    output = teacher.network(noise, t, teacher.encode_prompts(PROMPTS[:2])["prompt_embeds"], return_dict=False)[0]
    alpha, sigma = teacher.schedule.alpha(t), teacher.schedule.sigma(t)
    expected = (noise - sigma * output) / alpha
    assert torch.allclose(latents, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_student_in_pixel_space_samples_like_its_pipeline(tmp_path: Path, steps: int):
    from lcmdistill.diffusion.random import derive_seed
    from lcmdistill.sampling.student_pipeline import student_pipeline

    teacher = load_teacher(str(build_pixel(tmp_path / "t", channels=3)))
    pipeline, names = student_pipeline(teacher, teacher.network), list(LABELS)
    noise = sampled.start_noise(teacher, 8, 3, seed=0)
    found = sampled.student_latents(pipeline, names, noise, steps=steps, guidance_scale=1.0, seed=5, batch_size=2)
    generators = [torch.Generator().manual_seed(derive_seed(5, "fresh", i)) for i in range(3)]
    options = {"num_inference_steps": steps, "generator": generators, "latents": noise, "output_type": "pt"}
    expected = pipeline(batch_size=3, class_labels=[0, 1, 2], **options).images
    torch.testing.assert_close(teacher.decode(found), expected, rtol=1e-4, atol=1e-4)
