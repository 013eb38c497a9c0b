"""Linear layers laid out for a CPU say what the plain ones say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_ar.layers.mlp import SwiGLU
from vision_ar.layers.packed import Int8Linear, PackedLinear, add_linear, pack, packs

torch.set_num_threads(1)
needs_onednn = pytest.mark.skipif(not packs(torch.float32), reason="PyTorch was built without oneDNN")


def layer(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias=bias).to(dtype)


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (2, 1), (5, 3), (64, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_equals_the_plain_one_for_any_number_of_rows(rows, bias: bool) -> None:
    plain, x = layer(bias), torch.randn(*rows, 96, generator=torch.Generator().manual_seed(1))
    add = torch.randn(*rows, 160, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        packed = PackedLinear(plain)
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed(x, add), plain(x) + add, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(add_linear(packed, x, add), add_linear(plain, x, add), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this CPU has no bfloat16")
def test_a_packed_layer_in_bfloat16_is_as_exact_as_the_plain_one() -> None:
    exact, x = layer(), torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        wanted = exact.to(torch.bfloat16).float()(x.float())
        found = PackedLinear(layer(dtype=torch.bfloat16))(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_are_off_by_half_a_step_of_each_row_at_most(dtype: torch.dtype) -> None:
    plain = layer(bias=True)
    with torch.no_grad():
        plain.weight[3] *= 100  # one row of large weights must not coarsen the others
        plain.weight[5] = 0
    eye = torch.eye(96, dtype=dtype)
    with torch.inference_mode():
        found = (
            Int8Linear(plain)(eye).float() - plain.bias.to(dtype).float()
        ).T  # (out, in): the weights as they are held
        assert Int8Linear(plain)(eye, torch.ones(96, 160, dtype=dtype)).dtype == dtype
    step = plain.weight.abs().amax(dim=1, keepdim=True) / 127
    # half a step of rounding, and what bfloat16 takes from scale, sum and bias
    limit = 0.5 * step + plain.weight.abs() * 2**-7 + plain.bias[:, None].abs() * 2**-7 + 1e-6
    assert bool(((found - plain.weight).abs() <= limit).all())
    assert not found[5].any()


def test_packing_replaces_every_linear_layer_and_nothing_else() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(4, 32), nn.Sequential(SwiGLU(32), nn.LayerNorm(32)), nn.Linear(32, 5)).eval()
    ids = torch.tensor([[0, 3, 1]])
    with torch.no_grad():
        wanted = module(ids)
    pack(module)
    kinds = [type(part) for part in module.modules()]
    assert nn.Linear not in kinds and kinds.count(PackedLinear) == (3 if packs(torch.float32) else 0)
    with torch.inference_mode():
        torch.testing.assert_close(module(ids), wanted, rtol=1e-5, atol=1e-6)
    pack(module)  # nothing is left to do
    assert [type(part) for part in module.modules()] == kinds


def test_a_dtype_that_cannot_be_packed_and_another_device_stay() -> None:
    for module in (nn.Sequential(layer(dtype=torch.float64)), nn.Sequential(layer()).to("meta")):
        pack(module)
        assert type(module[0]) is nn.Linear


@needs_onednn
def test_packed_layers_are_saved_as_plain_ones_and_those_of_8_bits_are_not() -> None:
    module = nn.Sequential(layer(), layer(bias=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pack(module)
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    coarse = nn.Sequential(layer())
    pack(coarse, "int8")
    with pytest.raises(RuntimeError, match="weights of 8 bits must not be saved"):
        coarse.state_dict()


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize must be one of int8, float8, got 'int3'"):
        pack(nn.Sequential(layer()), "int3")
