"""Start a run from the weights of an earlier one."""

from __future__ import annotations

from torch import Tensor, nn

from vision_ar.checkpoints.store import read_weights


def load_init(module: nn.Module, source: str) -> None:
    """Copy every weight that `source` has into a training module; weights it lacks keep their start.

    Args:
        module: with parts named as in a saved model (tokenizer, generator).
        source: model folder, bundled name or Lightning checkpoint.

    Raises:
        ValueError: when no weight fits, or when one has another shape.
    """
    weights = read_weights(source)
    own = module.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own}
    if not fitting:
        raise ValueError(f"init_from must hold weights of this model, got {source} without any of them")
    check_shapes(own, fitting, source)
    module.load_state_dict(fitting, strict=False)


def load_tokenizer_weights(tokenizer: nn.Module, source: str) -> None:
    """Load a trained tokenizer strictly.

    Raises:
        ValueError: when the weights are not those of this tokenizer.
    """
    prefix = "tokenizer."
    weights = {n.removeprefix(prefix): v for n, v in read_weights(source).items() if n.startswith(prefix)}
    own = tokenizer.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(f"tokenizer_from must hold every tokenizer weight, {source} lacks {missing[0]} and others")
    check_shapes(own, weights, source)
    tokenizer.load_state_dict(weights, strict=True)


def check_shapes(own: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    """Raise ValueError for the first weight whose shape differs."""
    for name, value in weights.items():
        if name in own and own[name].shape != value.shape:
            found, wanted = tuple(value.shape), tuple(own[name].shape)
            raise ValueError(f"{name} must have shape {wanted}, got {found} in {source}; sizes must be the same")
