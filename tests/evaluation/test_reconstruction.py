"""Peak signal-to-noise ratio of cases that can be done by hand."""

from __future__ import annotations

import pytest
import torch

from vision_ar.evaluation.reconstruction import psnr, ssim

torch.set_num_threads(1)


def test_psnr_of_constant_errors_is_analytic_for_every_image() -> None:
    reference = torch.zeros(3, 3, 8, 8)
    images = torch.tensor([0.2, 0.02, 1.0])[:, None, None, None].expand_as(reference)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0, 6.0206]), rtol=1e-5, atol=1e-5)


def test_one_wrong_value_counts_by_its_share() -> None:
    reference = torch.full((1, 1, 10, 10), -1.0)
    images = reference.clone()
    images[0, 0, 3, 4] = 1
    assert psnr(images, reference).item() == pytest.approx(20)


def test_values_out_of_range_are_clamped_first() -> None:
    reference = torch.ones(1, 3, 4, 4)
    assert psnr(3 * reference, reference).item() == float("inf")
    assert psnr(-3 * reference, 2 * reference).item() == pytest.approx(0)


def test_half_precision_is_measured_in_float32() -> None:
    reference = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    value = psnr(reference + 2**-10, reference)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(66.2266, abs=1e-3)


def test_ssim_of_flat_images_is_the_luminance_term_of_values_from_0_up() -> None:
    grey, brighter = torch.full((1, 1, 16, 16), -0.2), torch.full((1, 1, 16, 16), 0.4)  # 0.4 and 0.7 in [0, 1]
    expected = (2 * 0.4 * 0.7 + 0.01**2) / (0.4**2 + 0.7**2 + 0.01**2)
    assert ssim(grey, brighter).item() == pytest.approx(expected, abs=1e-3)
    assert ssim(grey, grey).item() == pytest.approx(1, abs=1e-5)


def test_wrong_shapes_and_kinds_are_refused() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"images must have shape \(B, C, H, W\), got \(3, 4, 4\)"):
        psnr(images[0], images[0])
    with pytest.raises(
        ValueError, match=r"reference must have shape \(2, 3, 4, 4\), as images have, got \(1, 3, 4, 4\)"
    ):
        psnr(images, images[:1])
    with pytest.raises(TypeError, match=r"reference must be float in \[-1, 1\], got torch.uint8"):
        psnr(images, images.to(torch.uint8))
