"""The table of `ndcheck trace`: names are cut only where there is no room for them."""

from __future__ import annotations

import pytest

from ndcheck.reports.explain.trace import _cut, _limits

OP, MODULE = "scaled_dot_product_attention", "layers.*.self_attn.rotary_embedding"
ROWS = [
    ("op", "module", "introduces", "max ULP", "follows", "bits by rows"),
    (OP, MODULE, "20 of 20", "3072", "shape", "1 | 2-3 | 4-16"),
]


@pytest.mark.parametrize(("width", "is_whole"), [(80, False), (140, True)])
def test_op_names_are_whole_where_there_is_room(width, is_whole):
    op, module, *_ = (_cut(c, n) for c, n in zip(ROWS[1], _limits(ROWS, width), strict=True))
    assert ((op, module) == (OP, MODULE)) == is_whole
    assert op.startswith(OP[:15])


def test_a_short_op_leaves_its_room_to_the_module():
    rows = [ROWS[0], ("linear", MODULE, *ROWS[1][2:])]
    assert _limits(rows, 96)[:2] == (len("linear"), len(MODULE))
