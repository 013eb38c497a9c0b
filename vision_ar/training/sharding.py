"""Weights in shards: FSDP2 for models that do not fit beside their optimiser on one GPU.

Lightning's `ModelParallelStrategy` makes the processes; this says what is sharded. Every block of a `ModuleList` named
blocks is gathered when it is its turn, computes in bfloat16 on a GPU, and adds its gradients in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

BLOCKS = "blocks"
"""Name of the list of blocks in every backbone."""


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module in place, block by block, then what is left of it.

    Args:
        module: with all its weights.
        mesh: of the processes that hold one copy together.
    """
    half = torch.bfloat16 if mesh.device_type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for name, part in module.named_modules():
        if name.rpartition(".")[2] == BLOCKS and isinstance(part, nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for method in ("training_pass", "encode", "decode"):  # a tokenizer is used by these, not by `forward`
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name, gathered from the shards where there are any: every process must call it."""
    found = module.state_dict().items()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found}
