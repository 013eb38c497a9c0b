"""From features to a result that says all that decided it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vision_ar.evaluation.extractors import Extractor
from vision_ar.evaluation.features import FeatureStore
from vision_ar.evaluation.frechet import frechet_distance
from vision_ar.evaluation.metrics import inception_score, kernel_distance, precision_recall
from vision_ar.evaluation.protocols import Protocol
from vision_ar.evaluation.statistics import Statistics, replaced

LIBRARIES = ("vision-ar", "torch", "torchvision", "torch-fidelity", "torchmetrics", "numpy", "pillow")
BARE_NAMES = {"fid": "fid", "sfid": "sfid", "is": "inception_score", "kid": "kid"}
IN_DOMAIN_NAMES = {"fid": "fd", "sfid": "sfd", "is": "score", "kid": "kd"}


@dataclass
class Result:
    """Scores and all that decided them.

    Args:
        protocol: as it was followed.
        partial: True when fewer images were scored than the protocol asks; such a score is not comparable.
        scores: by name; in-domain ones are named after their extractor.
        stamp: model, settings, seed, reference, extractor, digest of the images, versions, date.
    """

    protocol: Protocol
    partial: bool
    scores: dict[str, float]
    stamp: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"scores": self.scores, "partial": self.partial, "protocol": asdict(self.protocol), **self.stamp}
        with replaced(path) as partial:
            partial.write_text(json.dumps(strict(content), indent=1, allow_nan=False))

    def table(self) -> str:
        """Lines for people."""
        count = self.stamp.get("num_images")
        share = f"PARTIAL, {count} of {self.protocol.num_samples} images" if self.partial else f"{count} images"
        reference = self.stamp["reference"]
        lines = [f"protocol {self.protocol.name}, {share}, against {reference['name']}"]
        if not self.partial and not reference.get("known_as"):
            lines.append(f"reference {reference['digest']} is none that the protocol knows: do not compare with others")
        if not self.stamp.get("extractor", {}).get("official", True):
            lines.append("extractor with other weights than the published ones: no figure of a paper compares")
        if self.stamp.get("left_out"):
            lines.append(f"left out, as no wanted classes are known: {', '.join(self.stamp['left_out'])}")
        lines += [f"{name:>24}  {value:.4f}" for name, value in self.scores.items()]
        return "\n".join(lines)


def strict(content: Any) -> Any:
    """The same with what JSON has: None for NaN and infinities, text for objects."""
    if isinstance(content, dict):
        return {str(name): strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if content is None or isinstance(content, str | int) else str(content)


def score_name(metric: str, extractor: Extractor) -> str:
    """What a metric is called on the features of an extractor: bare names belong to Inception."""
    if extractor.score_name == "fid":
        return BARE_NAMES.get(metric, metric)
    return f"{IN_DOMAIN_NAMES.get(metric, metric)}-{extractor.name}"


def score(
    samples: FeatureStore, reference: Statistics, metrics: Sequence[str], labels: Sequence[int] | None = None
) -> dict[str, float]:
    """Metrics of samples.

    Args:
        samples: their features, complete.
        reference: what they are compared with.
        metrics: fid, sfid, is, kid, precision_recall, accuracy; others are left to the caller.
        labels: wanted class of each sample, for accuracy.

    Raises:
        ValueError: if a metric needs what the reference or the extractor has not.
    """
    extractor, found = samples.extractor, {}
    for metric in metrics:
        name = score_name(metric, extractor)
        if metric == "fid":
            found[name] = frechet_distance(samples.moments(), reference.moments)
        elif metric == "sfid":
            if reference.spatial is None or extractor.spatial_dim is None:
                raise ValueError(f"reference must have mu_s and sigma_s for sfid, {reference.name} has none")
            found[name] = frechet_distance(samples.moments("spatial"), reference.spatial)
        elif metric == "is":
            found[name], found[f"{name}_std"] = inception_score(samples.logits)
        elif metric == "kid":
            found[name], found[f"{name}_std"] = kernel_distance(samples.features, features_of(reference, metric))
        elif metric == "precision_recall":
            names = [score_name(part, extractor) for part in ("precision", "recall")]
            pair = precision_recall(samples.features, features_of(reference, metric))
            found |= dict(zip(names, pair, strict=True))
        elif metric == "accuracy" and labels is not None:
            found[name] = class_accuracy(samples.logits, labels)
    return found


def features_of(reference: Statistics, metric: str) -> np.ndarray:
    """All features of a reference."""
    if reference.features is None:
        raise ValueError(
            f"reference must have features for {metric}, {reference.name} has moments only; "
            "give the images, or a file of make-reference"
        )
    return reference.features


def class_accuracy(logits: np.ndarray, labels: Sequence[int]) -> float:
    """Share of samples that the extractor takes for the class they were asked for."""
    guesses = np.concatenate([logits[i : i + 1000].argmax(axis=1) for i in range(0, len(logits), 1000)])
    return float((guesses == np.asarray(labels)).mean())


def stamp_of(samples: FeatureStore, reference: Statistics, **more: Any) -> dict[str, Any]:
    """Everything that decided a score beside the protocol."""
    extractor = samples.extractor
    judged = {"name": extractor.name, "weights": extractor.digest, "accuracy": extractor.accuracy}
    judged["official"] = extractor.official
    compared = {"name": reference.name, "digest": reference.digest, **reference.about}
    return stamp(samples.pixels.count, samples.digest(), compared, extractor=judged, **more)


def stamp(num_images: int, images: str, reference: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The same without features: number and digest of the images, what they are compared with, and versions."""
    return {
        **more,
        "num_images": num_images,
        "images": images,
        "reference": reference,
        "versions": {name: version_of(name) for name in LIBRARIES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version_of(library: str) -> str | None:
    """Installed version, None when it is not installed as a package."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
