"""How tensors lie in memory."""

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
    assert torch.equal(turned, u.bfloat16().float())
    with pytest.raises(ValueError, match=r"have \(3, 4\) elements and need \(3, 5\)"):
        memory.contiguous_vectors([u, v], u, torch.float32, (3, 5))
