"""The grid puts every valid token into its mini-batch, in order, whatever the padding, resets and starting positions."""

from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualform.learning.grid import arrange


def walk(T, chunk, position, mask, reset):
    """Say, token by token, what a row does: (mini-batch number, position in it from 1) per valid token, and the end."""
    rows, after = [], []
    for b in range(len(position)):
        i, number, seen = int(position[b]), 0, []
        for t in range(T):
            if reset[b, t]:
                i, number = 0, number + 1
            if mask[b, t]:
                i += 1
                seen.append((t, number, i))
                if i == chunk:
                    i, number = 0, number + 1
        rows.append(seen)
        after.append(i)
    return rows, after


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_grid_is_the_walk(data):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    chunk = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    bits = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)
    masked, resets = data.draw(st.booleans()), data.draw(st.booleans())
    mask = torch.tensor(data.draw(bits)) if masked else torch.ones(B, T, dtype=torch.bool)
    reset = torch.tensor(data.draw(bits)) if resets else torch.zeros(B, T, dtype=torch.bool)
    position = torch.tensor(data.draw(st.lists(st.integers(0, chunk - 1), min_size=B, max_size=B)))
    grid = arrange(T, chunk, position, mask if masked else None, reset if resets else None, torch.float64, data.draw(st.booleans()),
                   data.draw(st.sampled_from([None, None, 1, 2, 3])))  # fmt: skip
    rows, after = walk(T, chunk, position, mask, reset)
    assert grid.position.tolist() == after

    x = torch.arange(1, B * T + 1, dtype=torch.float64).reshape(B, T, 1, 1)
    back, laid = grid.new(x, *x.shape), {}
    for piece in grid.pieces(data.draw(st.sampled_from([1, 2, 4]))):
        assert len({grid.variants[n] for n in piece}) == 1
        found = grid.take(x, piece)
        laid |= {n: found[n - piece.start] for n in piece}
        grid.put(back, piece, found)
    assert list(laid) == list(range(len(grid.variants)))
    assert torch.equal(grid.done(back)[mask], x[mask])
    for b in range(B):
        blocks: dict[int, list] = {}
        for t, number, i in rows[b]:
            blocks.setdefault(number, []).append((float(x[b, t]), float(i)))
        found = []
        for n, variant in enumerate(grid.variants):
            tokens, W = laid[n][b, 0, :, 0], variant.width
            valid = grid.valid[n][b, :W].bool()
            assert not variant.dense or valid.all()
            assert variant.opens or grid.opens is None or not grid.opens[n].any()
            if variant.fresh:
                assert torch.equal(grid.i[n][b, :W][valid], torch.arange(1, W + 1).double()[valid])
            assert grid.i[n].min() >= 1
            assert grid.i[n].max() <= chunk
            here = list(zip(tokens[valid].tolist(), grid.i[n][b, :W][valid].tolist(), strict=True))
            if here:
                found.append(here)
                assert bool(grid.full[n][b]) == (here[-1][1] == chunk)
            else:
                assert not grid.full[n][b]
        assert list(chain(*found)) == list(chain(*blocks.values()))
        assert all(len({i for _, i in part}) == len(part) for part in found)  # no block spans two mini-batches
