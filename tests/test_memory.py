"""How tensors lie in memory."""

from types import SimpleNamespace

import pytest
import torch

from specnorm_fx import memory


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((1, 4, 1), (9, 1, 7), True),
        ((3, 4), (8, 2), False),
        ((3, 3), (4, 0), False),  # the span of a dense one, by a gap and elements in one place
    ],
)
def test_is_dense(shape, stride, dense):
    assert memory.is_dense(shape, stride) == dense


def test_vectors_are_read_where_they_lie_or_copied():
    u, v = torch.randn(3), torch.randn(8)[::2]
    kept, copied = memory.contiguous_vectors([u, v], u, torch.float32, (3, 4))
    assert kept is u
    assert copied.is_contiguous()
    assert torch.equal(copied, v)
    (turned,) = memory.contiguous_vectors([u.bfloat16()], u, torch.float32, (3,))
    assert turned.dtype == torch.float32  # torch.equal does not look at it
    assert torch.equal(turned, u.bfloat16().float())
    with pytest.raises(ValueError, match=r"have \(3, 4\) elements and need \(3, 5\)"):
        memory.contiguous_vectors([u, v], u, torch.float32, (3, 5))


def test_vectors_on_another_gpu_are_refused():
    weight, vector = (SimpleNamespace(device=torch.device("cuda", index)) for index in range(2))
    with pytest.raises(RuntimeError, match="on the device of their weights, cuda:0, got cuda:1"):
        memory.contiguous_vectors([vector], weight, torch.float32, (3,))


def test_one_weight_without_elements_among_others_is_refused():
    memory.refuse_empty([(3, 4), (1, 1)])
    with pytest.raises(ValueError, match="without elements"):
        memory.refuse_empty([(3, 4), (0, 4)])


def test_dense_copies_only_what_has_gaps():
    turned = torch.randn(4, 3).t()
    assert memory.dense(turned) is turned
    gaps = torch.randn(4, 6).t()[::2]
    copied = memory.dense(gaps)
    assert torch.equal(copied, gaps)
    assert copied.stride() == (1, 3)  # the dimensions in the same order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "stride"), [((3, 4), (4, 1)), ((3, 4, 2), (8, 1, 4)), ((5,), (1,))])
def test_empty_on_is_what_empty_strided_gives(shape, stride, dtype):
    made = memory.empty_on(torch.device("cpu"))(shape, stride, dtype)
    want = torch.empty_strided(shape, stride, dtype=dtype)
    for x in (made, want):
        assert (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) == (
            *(shape, stride, dtype, torch.device("cpu"), False),
        )
    assert made.untyped_storage().nbytes() == want.untyped_storage().nbytes()


@pytest.mark.parametrize("shape", [(3,), (2, 1, 4), (5, 3, 2, 2)])
def test_contiguous_strides(shape):
    assert memory.contiguous_strides(shape) == torch.empty(shape).stride()
