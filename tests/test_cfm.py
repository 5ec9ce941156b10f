import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from tests import components
from tests.components import seeded
from uplift_diffusers import LatentSpace
from uplift_diffusers.cfm import (
    NOISING_STEP,
    TIMESTEPS,
    check_scheduler,
    check_unet,
    enlarge,
    euler_scheduler,
    noise_context,
    point_on_path,
    predict_velocity,
    set_equal_steps,
    velocity,
)

SPACE = LatentSpace("test", 3, 8, 0.5)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def integrate(field, source, num_steps):
    """The scheduler's steps through `field(point, time)`."""
    scheduler = euler_scheduler()
    sample = source
    for timestep in set_equal_steps(scheduler, num_steps, torch.device("cpu")):
        sample = scheduler.step(field(sample, timestep / TIMESTEPS), timestep, sample).prev_sample
    return sample


def test_the_source_is_the_context_at_step_400_of_the_cosine_schedule():
    def share(step):  # Nichol and Dhariwal 2021, equation 17; steps count from 0
        return math.cos(((step + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = share(NOISING_STEP) / share(-1)
    context, noise = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    expected = math.sqrt(kept) * context + math.sqrt(1 - kept) * noise
    torch.testing.assert_close(noise_context(context, noise), expected, rtol=0, atol=1e-5)
    assert kept == pytest.approx(0.646, abs=5e-4)


def test_the_path_is_straight_and_its_velocity_constant():
    source, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    at = [point_on_path(source, target, torch.tensor([time, time])) for time in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(at[0], source)
    torch.testing.assert_close(at[2], target)
    torch.testing.assert_close(at[1], source + 0.25 * velocity(source, target))


def test_every_item_is_at_its_own_time():
    source, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    points = point_on_path(source, target, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(points, torch.stack([source[0], target[1]]))


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_the_exact_velocity_leads_to_the_target(num_steps):
    source, target = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    reached = integrate(lambda point, time: velocity(source, target), source, num_steps)
    torch.testing.assert_close(reached, target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_the_scheduler_takes_the_steps_of_a_hand_written_euler_loop(num_steps):
    def field(point, time):
        return torch.sin(3 * point) + 5 * time - point * time

    expected = randn(1, 3, 4, 4)
    for step in range(num_steps):
        expected = expected + field(expected, torch.tensor(step / num_steps)) / num_steps
    actual = integrate(field, randn(1, 3, 4, 4), num_steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_network_sees_the_point_before_the_context():
    seen = []

    class Net(torch.nn.Module):
        dtype = torch.float32

        def forward(self, sample, timestep):
            seen.append((sample, timestep))
            return components.make_flow_unet(SPACE)(sample, timestep)

    point, context = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    predict_velocity(Net(), point, context, torch.tensor(250.0))
    torch.testing.assert_close(seen[0][0], torch.cat([point, context], dim=1))
    assert seen[0][1] == 250


def test_enlarging_is_bilinear_between_pixel_centres():
    row = enlarge(torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2), (4, 4))[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_a_saved_network_knows_its_latents_without_a_warning(tmp_path, caplog):
    components.make_flow_unet(SPACE).save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not caplog.records
    check_unet(loaded, SPACE)
    with pytest.raises(ValueError, match=r"trained for 'test', got 'other'.*pass latent_space='test'"):
        check_unet(loaded, LatentSpace("other", 3, 8, 0.5))


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="8 input and 4 output channels for the latent space 'wide', got 6 and 3"):
        check_unet(components.make_flow_unet(SPACE), LatentSpace("wide", 4, 8, 0.5))


@pytest.mark.parametrize(
    "settings",
    [{}, {"invert_sigmas": True, "shift": 3.0}, {"invert_sigmas": True, "use_karras_sigmas": True}],
    ids=str,
)
def test_a_scheduler_of_other_steps_is_refused(settings):
    check_scheduler(euler_scheduler())
    with pytest.raises(ValueError, match=r"`scheduler` must have .* Use FlowMatchEulerDiscreteScheduler"):
        check_scheduler(FlowMatchEulerDiscreteScheduler(**settings))


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="`scheduler` must be a FlowMatchEulerDiscreteScheduler, got a DDIMScheduler"):
        check_scheduler(DDIMScheduler())
