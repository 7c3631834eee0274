"""What is asked of cuDNN: its answer is looked at only where there is a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from easydel.ops.attention.cudnn import tree_attention_cudnn
from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.mask import tree_mask
from easydel.ops.attention.residuals import keep_attention
from easydel.ops.attention.tree_attention import AttentionCall, choose_backend
from easydel.ops.attention.xla import tree_attention_xla
from tests.ops.attention.forest import forest, values, with_gradients

WINDOWS = pytest.mark.parametrize("window", [None, 20, jnp.int32(20)], ids=["none", "number", "array"])


def error_beside_xla(run, arrays, *rest) -> list[float]:
    """How far a backend in 16 bits is from float32, in units of how far XLA in 16 bits is."""
    exact = with_gradients(tree_attention_xla)(*(x.astype(jnp.float32) for x in arrays), *rest)
    ours, xla = (with_gradients(f)(*arrays, *rest) for f in (run, tree_attention_xla))
    distance = [
        [float(jnp.linalg.norm(x.astype(jnp.float32) - truth)) for x, truth in zip(results, exact)]
        for results in (ours, xla)
    ]
    return [x / y for x, y in zip(*distance)]


@WINDOWS
def test_the_call_answered_by_xla_gives_outputs_and_gradients_of_xla(monkeypatch, window):
    """The same arguments, mask and padding, with cuDNN's name taken out."""
    attend = jax.nn.dot_product_attention

    def answered_by_xla(*args, implementation, **options):
        assert implementation == "cudnn"
        return attend(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered_by_xla)
    arrays = values(2, 200, 4, 2, 16, jnp.bfloat16)
    assert max(error_beside_xla(tree_attention_cudnn, arrays, forest(2, 200), AttentionOptions(window))) < 2


def test_the_call_is_lowered_for_cuda_without_a_gpu(monkeypatch):
    """One call forward, one backward; keys are not repeated; the length is a multiple of 128."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    arrays = values(2, 200, 4, 2, 64, jnp.bfloat16)
    text = with_gradients(tree_attention_cudnn).trace(*arrays, forest(2, 200)).lower(lowering_platforms=("cuda",))
    calls = [line for line in text.as_text().splitlines() if "__cudnn$fmha" in line]
    assert ["Backward" in call for call in calls] == [False, True]
    for call in calls:
        signature = call[call.index("} : (") :]
        assert "(tensor<2x256x4x64xbf16>, tensor<2x256x2x64xbf16>, tensor<2x256x2x64xbf16>" in signature
        assert "tensor<2x1x256x256xbf16>" in signature


def test_the_backward_pass_of_a_rebuilt_layer_does_not_attend_again(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    q, k, v, _ = values(1, 128, 4, 2, 64, jnp.bfloat16)
    ids = forest(1, 128)

    def forward_calls(policy) -> int:
        rebuilt = jax.checkpoint(lambda q: tree_attention_cudnn(jnp.sin(q), k, v, ids, DEFAULT_OPTIONS), policy=policy)
        gradient = jax.jit(jax.value_and_grad(lambda q: rebuilt(q).astype(jnp.float32).sum()))
        lines = gradient.trace(q).lower(lowering_platforms=("cuda",)).as_text().splitlines()
        return sum("__cudnn$fmha" in line and "Backward" not in line for line in lines)

    assert (forward_calls(None), forward_calls(keep_attention)) == (2, 1)


def test_every_token_sees_itself_so_that_no_row_of_the_mask_is_empty():
    trees = forest(2, 200)
    for window in (None, 1):
        for ids in (trees, TokenIds(*(0 * x for x in trees))):
            assert np.diagonal(tree_mask(ids, window), axis1=1, axis2=2).all()


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 64), (jnp.bfloat16, 12), (jnp.bfloat16, 256)])
def test_what_cudnn_does_not_take_is_refused_with_the_way_out(dtype, size):
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with pytest.raises(ValueError, match="needs (bfloat16|heads).* Leave attention_backend=None"):
        choose_backend(AttentionCall(dtype, size, DEFAULT_OPTIONS, gpu), "cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@WINDOWS
@pytest.mark.parametrize("length", [192, 1000])
def test_cudnn_gives_the_numbers_of_xla(window, length):
    arrays = values(2, length, 14, 2, 64, jnp.bfloat16)
    assert max(error_beside_xla(tree_attention_cudnn, arrays, forest(2, length), AttentionOptions(window))) < 2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_on_cudnn_nothing_leaks_between_pairs_or_between_branches():
    ids = forest(1, 256)
    q, k, v, _ = values(1, 256, 4, 2, 64, jnp.bfloat16)
    attend = jax.jit(lambda k, v: tree_attention_cudnn(q, k, v, ids, DEFAULT_OPTIONS))
    before = attend(k, v)
    for segment, branch in [(1, 0), (1, 1), (1, 2), (2, 0)]:
        part = (ids.segment == segment) & (ids.branch == branch)
        shift = 3 * part[..., None, None].astype(k.dtype)
        after = attend(k + shift, v + shift)
        moved = np.flatnonzero(np.array(jnp.abs(after - before).max(axis=(0, 2, 3)) > 0))
        may_move = (ids.segment == segment) & ((ids.branch == branch) | (branch == 0))
        assert moved.size and set(moved) <= set(np.flatnonzero(may_move[0]))
