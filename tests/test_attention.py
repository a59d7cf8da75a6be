"""Attention after a shared prefix and at low precision, against the plain definition."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt.clip.inside import attend, attend_after_prefix, merge_heads, split_heads

HEADS, WIDTH = 3, 24


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    prefix=st.integers(1, 17),
    ends_only=st.booleans(),
    seed=st.integers(0, 99),
)
def test_after_prefix_equals_the_joined_sequences(lengths, prefix, ends_only, seed):
    torch.manual_seed(seed)
    lengths = sorted(lengths)
    groups = tuple((lengths.count(s), s) for s in sorted(set(lengths)))
    q, k, v = (torch.randn(sum(lengths), WIDTH, requires_grad=True) for _ in range(3))
    pk, pv = (torch.randn(HEADS, prefix, WIDTH // HEADS, requires_grad=True) for _ in range(2))
    given_to = (q, k, v, pk, pv)

    expected, start = [], 0
    for size in lengths:
        own = slice(start, start + size)
        keys = torch.cat([pk, split_heads(k[own], HEADS)], dim=1)
        values = torch.cat([pv, split_heads(v[own], HEADS)], dim=1)
        mask = torch.ones(size, prefix + size, dtype=torch.bool).tril(prefix)
        query = split_heads(q[own], HEADS)
        row = merge_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))
        expected.append(row[-1:] if ends_only else row)
        start += size
    expected = torch.cat(expected)

    ends = torch.tensor(lengths).cumsum(0) - 1
    found = attend_after_prefix(q[ends] if ends_only else q, k, v, pk, pv, groups)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), given_to),
        torch.autograd.grad((expected * weights).sum(), given_to),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@settings(max_examples=10)
@given(queries=st.sampled_from([1, 7, 50]), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_low_precision_follows_full_precision(queries, rows, seed):
    torch.manual_seed(seed)
    low = [
        torch.randn(rows, HEADS, length, 8).bfloat16().requires_grad_()
        for length in (queries, 50, 50)
    ]
    full = [t.detach().float().requires_grad_() for t in low]
    weights = torch.randn(rows, queries, HEADS * 8)
    found, expected = attend(*low), attend(*full)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    mine = torch.autograd.grad((found * weights).sum(), low)
    theirs = torch.autograd.grad((expected * weights).sum(), full)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()
