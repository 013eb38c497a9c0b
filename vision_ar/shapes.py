"""Shape checks at public entry points, in the axis letters of the project.

B batch, T tokens, S cached or condition tokens, V vocabulary, D backbone width, N heads, E head width, C channels,
K codebook size, H W image, Z Y X volume, P points, G draft tokens, Q readouts, A position axes, L layers.
"""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Raise when a tensor does not have the named axes.

    Args:
        name: what the error calls the tensor.
        tensor: to be checked.
        axes: letters with spaces, for instance "B T".
        **sizes: required size of some axes.

    Raises:
        ValueError: with the expected and the found shape in one line.
    """
    letters = axes.split()
    fits = tensor.dim() == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
