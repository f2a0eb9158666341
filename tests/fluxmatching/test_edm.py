"""EDM preconditioning against its definition, and the UNet against the paper's Table 3."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxmatching import EDMField, UNet
from tests.support.losses import flux_loss

F64 = torch.float64


def shifted(x: Tensor, c_noise: Tensor) -> Tensor:
    return torch.tanh(x) + c_noise.reshape(-1, *(1 for _ in x.shape[1:]))


@pytest.mark.parametrize("sigma", [1e-4, 0.3, 80.0])
def test_is_the_denoiser_of_karras_et_al(sigma: float) -> None:
    z, s, d = torch.randn(5, 3, 4, dtype=F64), torch.tensor(sigma, dtype=F64), 0.7
    total = s**2 + d**2
    denoised = d**2 / total * z + s * d / total.sqrt() * shifted(
        z / total.sqrt(), s.log() / 4 * torch.ones(5, dtype=F64)
    )
    torch.testing.assert_close(EDMField(shifted, d)(z, s), (denoised - z) / s**2, rtol=1e-7, atol=1e-7)


def test_float32_keeps_its_digits_at_small_sigma() -> None:
    z, sigma = torch.randn(50, 2), torch.tensor(2e-3)
    exact = EDMField(shifted)(z.double(), sigma.double())
    assert (EDMField(shifted)(z, sigma) - exact).norm() < 1e-6 * exact.norm()


def test_a_level_may_be_a_number() -> None:
    field, z = EDMField(lambda x, c_noise: x * c_noise[:, None]), torch.randn(3, 2)
    assert torch.equal(field(z, 0.5), field(z, torch.tensor(0.5)))


def test_a_width_that_its_layers_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"width must be a multiple of norm_num_groups.* got 20 and 32"):
        UNet(32, width=20)


def test_a_level_for_each_sample() -> None:
    field, z, sigma = EDMField(shifted), torch.randn(3, 2, dtype=F64), torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    one_by_one = torch.cat([field(z[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(field(z, sigma), one_by_one)
    for bad in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="sigma must be one number or one per sample"):
            field(z, bad)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma_data(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        EDMField(shifted, sigma_data)


class TestUNet:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fluxkernels[images]'")

    def test_has_the_size_of_the_paper(self) -> None:
        with torch.device("meta"):
            network = UNet()
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(35.7e6, rel=0.002)

    def test_trains_with_every_way_to_differentiate(self) -> None:
        torch.manual_seed(0)
        small = UNet(8, 1, width=8, multipliers=(1, 2), attention=(4,), blocks=1, norm_num_groups=4).eval()
        field, x, sigma = EDMField(small), torch.randn(4, 1, 8, 8), torch.tensor(0.5)
        options = {"x": x, "sigma": 0.5, "seed": 1}
        at_level = lambda z: field(z, sigma)  # noqa: E731
        central = flux_loss(at_level, **options, second_derivatives="finite_difference")
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives only
            exact = flux_loss(at_level, **options, second_derivatives="double_backward")
        assert (central - exact).norm() < 1e-2 * exact.norm()
        central.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())

    def test_bad_sizes(self) -> None:
        with pytest.raises(ValueError, match="size must be a multiple of 8, got 12"):
            UNet(12)
        with pytest.raises(
            ValueError, match=r"attention must be at resolutions of its levels, \[32, 16, 8, 4\], got \[7\]"
        ):
            UNet(32, attention=(7,))


def test_a_network_of_another_form_is_explained() -> None:
    z = torch.randn(4, 2)
    with pytest.raises(TypeError, match=r"EDMField: network is called with two arguments, x and c_noise \(Linear"):
        EDMField(nn.Linear(2, 2))(z, 0.5)
    output = SimpleNamespace(sample=z)  # as networks of diffusers return it
    with pytest.raises(TypeError, match=r"network must return a torch\.Tensor, got SimpleNamespace; its \.sample"):
        EDMField(lambda x, c_noise: output)(z, 0.5)  # type: ignore[arg-type, return-value]
