"""Perceptual terms: LPIPS and REPA need somebody else's weights, the classifier is our own. Off by default."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ar.layers.classifier import SmallClassifier, load_classifier

DINO_DIM = 768
DINO_SIZE = 224
REPA_WIDTH = 2048  # D-AR code
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualLosses(nn.Module):
    """LPIPS and classifier distance of an estimate, REPA alignment of features, each only when its weight is positive.

    The judges are loaded on first use and kept out of the state dict: they are not part of a tokenizer.

    Args:
        lpips: weight of LPIPS; only whether it is positive matters here.
        repa: weight of REPA, likewise.
        repa_weights: file with DINOv2 ViT-B/14 weights as timm stores them.
        dim: width of the features that REPA reads.
        classifier: file or bundled name of a small classifier as a judge; None for none.
        lpips_weights: file of torchvision's VGG-16, or None for the cache of torch hub.
    """

    def __init__(
        self,
        lpips: float,
        repa: float,
        repa_weights: str | None,
        dim: int,
        classifier: str | None = None,
        lpips_weights: str | None = None,
    ) -> None:
        super().__init__()
        self._classifier, self._lpips_weights = classifier, lpips_weights
        self.uses_lpips, self.uses_repa, self._repa_weights = lpips > 0, repa > 0, repa_weights
        if self.uses_repa and repa_weights is None:
            raise ValueError("repa_weights must name a file with DINOv2 ViT-B/14 weights when repa > 0, got None")
        if self.uses_repa:
            layers = (nn.Linear(dim, REPA_WIDTH), nn.Linear(REPA_WIDTH, REPA_WIDTH), nn.Linear(REPA_WIDTH, DINO_DIM))
            self.repa_out = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        self._judges: dict[str, nn.Module] = {}

    def forward(self, images: Tensor, estimate: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses; empty when all are off.

        Args:
            images: the data, (B, 3, H, W), in [-1, 1].
            estimate: what the decoder makes of it, (B, 3, H, W).
            features: patch vectors of the velocity net on a square grid, (B, T, D), for REPA.
        """
        named = {}
        if self.uses_lpips:
            judge = self._judge("lpips", partial(load_lpips, self._lpips_weights)).to(images.device)
            with torch.autocast(images.device.type, enabled=False):
                named["lpips"] = judge(estimate.float(), images.float()).mean()
        if self._classifier is not None:
            judge = self._judge("classifier", partial(load_classifier, self._classifier))
            judge = judge.to(images.device).to(memory_format=torch.channels_last)  # a third faster on a CPU
            named["classifier"] = classifier_distance(judge, images, estimate)
        if self.uses_repa:
            assert features is not None
            judge = self._judge("repa", lambda: load_dino(self._repa_weights)).to(images.device)
            named["repa"] = repa_loss(self.repa_out(features), dino_features(judge, images))
        return named

    def _judge(self, name: str, load) -> nn.Module:  # type: ignore[no-untyped-def]
        if name not in self._judges:
            self._judges[name] = load().eval().requires_grad_(False)
        return self._judges[name]


def classifier_distance(judge: nn.Module, images: Tensor, estimate: Tensor) -> Tensor:
    """Mean squared difference of unit-length activations over places and stages, in [0, 4].

    Rows of the batch are shifted by 0 to 3 pixels first: seen at one place only, the pooling grid of the judge would
    be painted into the estimate as a pattern of dots.

    Source:
        The distance is that of LPIPS (Zhang et al. 2018) without its learned channel weights.
    """
    assert isinstance(judge, SmallClassifier)
    images, estimate = shift_rows(images), shift_rows(estimate)
    with torch.no_grad():
        wanted = judge.activations(images)
    pairs = zip(judge.activations(estimate), wanted, strict=True)
    return torch.stack(
        [(F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean() for a, b in pairs]
    ).mean()


def shift_rows(images: Tensor, most: int = 4) -> Tensor:
    """Roll image i of (B, C, H, W) by i modulo `most` pixels up and i // `most` modulo `most` to the left."""
    row = torch.arange(images.shape[0], device=images.device)
    height, width = (torch.arange(size, device=images.device) for size in images.shape[2:])
    up = (height + (row % most)[:, None]) % len(height)
    left = (width + (row // most % most)[:, None]) % len(width)
    return images[row[:, None, None], :, up[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def repa_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine between predictions (B, T, C) and judge features (B, S, C), pooled to the judge's grid."""
    side, judge_side = (round(x.shape[1] ** 0.5) for x in (predicted, wanted))
    grid = predicted.transpose(1, 2).unflatten(2, (side, side))
    pooled = F.adaptive_avg_pool2d(grid, judge_side).flatten(2).transpose(1, 2)
    return 1 - F.cosine_similarity(pooled.float(), wanted.float(), dim=-1).mean()


def dino_features(judge: nn.Module, images: Tensor) -> Tensor:
    """Normalised patch tokens of DINOv2 at 224 pixels, (B, 256, 768)."""
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = F.interpolate((images + 1) / 2, size=DINO_SIZE, mode="bicubic", align_corners=False)
    with torch.no_grad():
        return judge.forward_features((pixels - mean) / std)[:, 1:]  # type: ignore[operator]


def load_lpips(weights: str | None = None) -> nn.Module:
    """LPIPS with a VGG-16 trunk, from torchmetrics and torchvision; the bare net, which takes any range of values.

    Args:
        weights: file of torchvision's VGG-16; None looks in the cache of torch hub. Nothing is downloaded.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else.
    """
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2])
    if not path.is_file():
        raise FileNotFoundError(f"LPIPS needs the weights of VGG-16 in {path}, got no such file; fetch {url}")
    net = _LPIPS(net="vgg", pnet_rand=True)
    trunk = torch.load(path, map_location="cpu", weights_only=True)
    own = net.net.state_dict()  # slice2.5.weight is what torchvision calls features.5.weight
    try:
        net.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in own})
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"lpips_weights must be those of torchvision's vgg16, got {path}: {error}") from error
    return net


def load_dino(path: str | None) -> nn.Module:
    """DINOv2 ViT-B/14 from a timm weights file.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    import timm

    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"repa_weights must be a file with timm's vit_base_patch14_dinov2 weights, got {path}")
    return timm.create_model(
        "vit_base_patch14_dinov2.lvd142m", pretrained=False, checkpoint_path=path, img_size=DINO_SIZE
    )
