"""A discriminator that asks whether each patch of an image is real, and what it says to whom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE, INIT_STD, MAX_BALANCE = 0.2, 0.02, 1e4


class PatchDiscriminator(nn.Module):
    """Convolutions with stride 2, then one logit for every overlapping patch.

    Args:
        channels: of the images.
        width: channels of the first layer; they double up to 8 times that.
        num_layers: layers with stride 2; each doubles the side of a patch, 3 make it 70 pixels.

    Source:
        Isola et al. 2017, arXiv 1611.07004 (PatchGAN), with batch norm.
    """

    def __init__(self, channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        last = width
        for number in range(1, num_layers + 1):
            wide, stride = width * min(2**number, 8), 2 if number < num_layers else 1
            layers += [nn.Conv2d(last, wide, 4, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(SLOPE)]
            last = wide
        self.layers = nn.Sequential(*layers, nn.Conv2d(last, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, C, H, W); positive means real."""
        return self.layers(images)


class Adversary(nn.Module):
    """A discriminator with its losses; it is trained beside a tokenizer and never part of a saved model.

    Args:
        channels: of the images.
        width: channels of the discriminator's first layer.
        num_layers: its layers with stride 2; 3 need images of 32 pixels at least.
        weight: of the discriminator's judgement in the tokenizer's loss.
        start_step: optimiser step from which both count; before it only the tokenizer learns.
        loss: hinge, or softplus, the non-saturating one.
        adaptive: scale `weight` by the ratio of the gradients of the other losses and of the judgement at the last
            layer (Esser et al. 2021).
        lr: learning rate of the discriminator (AdamW with betas 0.9 and 0.95, weight decay 0.05); None is that of the
            tokenizer.
        clip_norm: largest norm of the gradients, of the tokenizer and of the discriminator; 0 is no limit.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        num_layers: int = 3,
        weight: float = 0.5,
        start_step: int = 20000,
        loss: str = "hinge",
        adaptive: bool = False,
        lr: float | None = None,
        clip_norm: float = 1.0,
    ) -> None:
        super().__init__()
        if loss not in ("hinge", "softplus"):
            raise ValueError(f"loss must be hinge or softplus, got {loss!r}")
        if not weight >= 0 or start_step < 0:
            raise ValueError(f"weight and start_step must be at least 0, got {weight} and {start_step}")
        self.weight, self.start_step, self.kind, self.adaptive = weight, start_step, loss, adaptive
        self.lr, self.clip_norm = lr, clip_norm
        self.discriminator = PatchDiscriminator(channels, width, num_layers)

    def judge(self, rebuilt: Tensor) -> Tensor:
        """Loss of the tokenizer: low when its images (B, C, H, W) are taken for real."""
        logits = self.discriminator(rebuilt)
        return -logits.mean() if self.kind == "hinge" else F.softplus(-logits).mean()

    def losses(self, images: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        """Loss of the discriminator itself, and the logits it gives to real and rebuilt images."""
        real, fake = self.discriminator(images), self.discriminator(rebuilt.detach())
        if self.kind == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        return {"discriminator": loss, "logits_real": real.mean().detach(), "logits_rebuilt": fake.mean().detach()}

    def balance(self, loss: Tensor, judgement: Tensor, last_weight: Tensor | None) -> Tensor:
        """What the judgement is multiplied by beside `weight`; 1 unless it is adaptive."""
        if not self.adaptive or last_weight is None:
            return torch.ones_like(judgement)
        own, other = (torch.autograd.grad(x, last_weight, retain_graph=True)[0].norm() for x in (loss, judgement))
        return (own / (other + 1e-4)).clamp(0, MAX_BALANCE).detach()
