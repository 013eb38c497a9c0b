"""Linear layers laid out for inference.

On a CPU sampling multiplies all weights with very few rows, so it costs what reading the weights costs. PyTorch's
float32 product reads them once per row from 2 rows on (guidance pairs); oneDNN's, with weights laid out in its own
blocks, once for all rows. Measured on 2 cores of an AMD EPYC, 85 M weights, 2 rows: 31.3 ms against 8.1 ms in float32,
6.4 against 4.1 ms in bfloat16, 2.6 ms in int8. A GPU keeps its layout; 8-bit weights halve the bytes of few rows there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ar.kernels import fused_block
from vision_ar.kernels.fused_block import Weights

QUANTIZE = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""Kinds of 8-bit weights; float8 is for a GPU."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
EXPECTED_ROWS = 2
"""Rows that oneDNN is told to expect; its layout for 2 serves 1 to 16 as well as their own would."""


class InferenceLinear(nn.Module, ABC):
    """A linear layer laid out for inference: it has no parameters, and adds to what it makes in the same call.

    Args:
        linear: where the weights come from.
    """

    weight_bytes: int
    """What reading the weights once reads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()

    @abstractmethod
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out) in the dtype of `x`, plus `add` of that shape."""


class PackedLinear(InferenceLinear):
    """The blocked layout of oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight_bytes = linear.weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), EXPECTED_ROWS)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """As above."""
        if add is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._weight, self._bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._weight.to_dense()
        if self._bias is not None:
            destination[f"{prefix}bias"] = self._bias


class QuantizedLinear(InferenceLinear):
    """Weights of 8 bits with one scale per output: rounded once, multiplied in the dtype of what comes in.

    Few rows on a GPU read 8 bits a weight; more rows, and a CPU, make the numbers whole first.

    Args:
        linear: where the weights come from.
        dtype: torch.int8 or torch.float8_e4m3fn.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(linear)
        self.weights = quantized(linear.weight.detach(), dtype)
        self.weight_bytes = self.weights.matrix.nbytes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RuntimeError("weights of 8 bits must not be saved, they lost precision; load the model without quantize")

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """As above."""
        rows = x.reshape(-1, self.in_features)
        if fused_block.serves(rows):
            out = fused_block.linear(rows, self.weights).view(*x.shape[:-1], -1)
        else:
            out = F.linear(x, self.weights.whole(x.dtype))
        if self._bias is not None:
            out = out + self._bias.to(x.dtype)
        return out if add is None else out + add


class Int8Linear(QuantizedLinear):
    """8-bit integers on a CPU, whose kernel takes activations in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        assert self.weights.scales is not None
        self._weight, self._scales = self.weights.matrix, self.weights.scales.to(torch.bfloat16)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """As above."""
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = torch._weight_int8pack_mm(rows.to(torch.bfloat16), self._weight, self._scales).to(x.dtype)
        out = out if x.dim() == 2 else out.view(*x.shape[:-1], -1)
        if self._bias is not None:
            out = out + self._bias.to(x.dtype)
        return out if add is None else out.add_(add)


def quantized(weight: Tensor, dtype: torch.dtype) -> Weights:
    """Weights (out, in) in 8 bits: the largest of each output becomes the largest number there is."""
    weight, largest = weight.float(), LARGEST[dtype]
    scales = (weight.abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (weight / scales[:, None]).clamp(-largest, largest)
    return Weights((scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales)


def weights_of(layer: nn.Module) -> Weights | None:
    """What a kernel of our own reads of a linear layer without bias; None when it cannot."""
    if isinstance(layer, QuantizedLinear) and layer._bias is None:
        return layer.weights
    return Weights(layer.weight) if type(layer) is nn.Linear and layer.bias is None else None


def add_linear(layer: nn.Module, x: Tensor, add: Tensor) -> Tensor:
    """layer(x) + add, in one call where the layer can."""
    return layer(x, add) if isinstance(layer, InferenceLinear) else layer(x) + add


def pack(module: nn.Module, quantize: str | None = None) -> None:
    """Replace the linear layers of a module by those for inference, in place; it can then not be trained or moved.

    Args:
        module: any; layers whose dtype has no better layout on their device stay as they are.
        quantize: int8, float8 (on a GPU), or None.

    Raises:
        ValueError: for another kind of quantisation, or one that the device does not have.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, laid_out(layer, quantize))


def laid_out(layer: nn.Linear, quantize: str | None) -> nn.Module:
    """A linear layer as `pack` wants it where it is."""
    device = layer.weight.device.type
    if quantize is None:
        return PackedLinear(layer) if device == "cpu" and packs(layer.weight.dtype) else layer
    if device == "cpu":
        if quantize != "int8":
            raise ValueError(f"quantize must be int8 on a CPU, got {quantize}")
        return Int8Linear(layer)
    if device != "cuda":
        raise ValueError(f"quantize must be left out on {device}, got {quantize}")
    return QuantizedLinear(layer, QUANTIZE[quantize])


def packs(dtype: torch.dtype) -> bool:
    """True when oneDNN has linear layers of this dtype on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
