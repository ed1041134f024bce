"""The kernels of a decoding step equal plain torch: on CUDA, or under TRITON_INTERPRET=1 without a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these kernels run under TRITON_INTERPRET=1 only", allow_module_level=True)

from shl.core import kernels
from shl.core.fused import fused
from shl.core.models import load

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *([torch.bfloat16] if WHERE == "cuda" else [])]  # the interpreter knows no bfloat16


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(WHERE, dtype)


def close(found, wanted):
    tolerance = 2e-5 if wanted.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 32), (8, 1, 64), (2, 2, 24)])
def test_attention_over_slots(dtype, window, splits, heads, kv_heads, width):
    rows, capacity = 5, 150
    q = random(rows, heads, 1, width, dtype=dtype)
    k, v = (random(rows, kv_heads, capacity, width, dtype=dtype, seed=seed) for seed in (1, 2))
    read = torch.tensor([0, 3, 63, 64, 149], device=WHERE)
    column = torch.arange(capacity, device=WHERE)
    seen = (column <= read[:, None]) & (column > read[:, None] - (window or capacity))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=seen[:, None, None], scale=0.2, enable_gqa=True
    )
    k[~seen[:, None].expand(rows, kv_heads, capacity)] = torch.nan  # nobody reads these
    v[~seen[:, None].expand(rows, kv_heads, capacity)] = torch.nan
    close(kernels.attend(q, k, v, read, 0.2, window, splits), wanted.transpose(1, 2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_goes_where_its_row_is(dtype):
    k, v = (random(3, 1, 2, 24, dtype=dtype, seed=seed).transpose(1, 2) for seed in (1, 2))
    rooms = [torch.zeros(4, 2, 10, 24, dtype=dtype, device=WHERE) for _ in range(2)]
    read = torch.tensor([0, 9, 4], device=WHERE)
    kernels.put(k, v, rooms[0][:3], rooms[1][:3], read)
    for room, states in zip(rooms, (k, v), strict=True):
        wanted = torch.zeros_like(room)
        for row, at in enumerate(read.tolist()):
            wanted[row, :, at] = states[row, :, 0]
        assert torch.equal(room, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "rounded"), [(0.0, True), (1.0, False)])
def test_the_gradient_of_a_norm(dtype, offset, rounded):
    x = random(2, 3, 40, dtype=dtype).requires_grad_()
    weight, pulled = random(40, dtype=dtype, seed=1), random(2, 3, 40, dtype=dtype, seed=2)
    wide = x.detach().float().requires_grad_()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (weight.float() + offset)
    normed.backward(pulled.float())
    out = kernels.Norm.apply(x, weight, 1e-5, offset, rounded)
    out.backward(pulled)
    close(out, normed.to(dtype))
    close(x.grad, wide.grad.to(dtype))


@pytest.fixture
def compiled(monkeypatch):
    """Kernels also where they are but interpreted."""
    monkeypatch.setattr("shl.core.fused.compiles", lambda device: True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_models_own_operations_are_found_and_replaced(tiny_model, family, compiled):
    loaded = load(str(tiny_model(family)), device=WHERE)
    for module in loaded.body.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data.normal_(generator=torch.Generator(WHERE).manual_seed(0))
    ids, one = torch.tensor([[5, 6, 7]], device=WHERE), torch.tensor([[5], [9]], device=WHERE)
    at = torch.tensor([[3], [8]], device=WHERE)
    calls = []
    with torch.inference_mode():
        wanted = loaded.model(ids).logits, loaded.model(one, position_ids=at).logits
        own = kernels.rms_norm, kernels.rotate
        try:
            kernels.rms_norm = lambda *a: calls.append("norm") or own[0](*a)
            kernels.rotate = lambda *a: calls.append("turn") or own[1](*a)
            with fused(loaded):
                calls.clear()  # the comparisons
                found = loaded.model(ids).logits, loaded.model(one, position_ids=at).logits
        finally:
            kernels.rms_norm, kernels.rotate = own
        after = loaded.model(ids).logits
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in loaded.body.modules())
    assert calls.count("norm") == 2 * norms and calls.count("turn") == loaded.n_blocks  # only where one token is read
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, wanted[0])  # everything is as it was


def test_what_computes_something_else_stays(tiny_model, compiled):
    loaded = load(str(tiny_model("llama")), device=WHERE)
    kind = type(loaded.blocks[0].input_layernorm)
    own = kind.forward
    kind.forward = lambda self, x: own(self, x) * 1.1
    try:
        with fused(loaded):
            assert "forward" not in vars(loaded.blocks[0].input_layernorm)
    finally:
        kind.forward = own


def test_training_with_kernels_is_training_without(tiny_model, tmp_path, monkeypatch):
    from shl.core.defaults import TrainConfig
    from shl.train import heal
    from test_train import make_records

    def rows(compiles):
        monkeypatch.setattr("shl.core.fused.compiles", lambda device: compiles)
        loaded = load(str(tiny_model("gemma3")), device=WHERE, dtype="float32")
        cfg = TrainConfig(epochs=1, tau=0.0, lr=1e-3, batch_size=2, on_policy=0, holdout=0.0)
        return heal(loaded, make_records(2), cfg, tmp_path / f"{compiles}").rows

    for mine, theirs in zip(rows(True)[1:], rows(False)[1:], strict=True):
        for name in ("nll", "grad_norm", "update_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3)
