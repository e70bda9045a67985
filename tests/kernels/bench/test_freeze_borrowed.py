"""From measured cells to frozen ranges: what is borrowed was faster, and had our bits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.ops import freeze_borrowed as freeze
from ndcheck_kernels.cuda import borrowed_ranges

BATCHES = (1, 16, 64, 128, 512)
RATIOS = st.dictionaries(st.sampled_from(BATCHES), st.sampled_from([0.5, 0.95, 0.99, 1.3]))


def cell(m, ratio, form="plain"):
    return {"n": "8", "k": "4", "m": str(m), "form": form,
            "ours_us": "10", "cublas_us": str(10 * ratio), "stock_us": "1"}  # fmt: skip


def bits(m, reason):
    return {"n": "8", "k": "4", "m": str(m), "reason": reason}


def borrows(found, m):
    return any(first <= m <= last for first, last in found.get((8, 4), ()))


@given(RATIOS, RATIOS, st.sets(st.integers(1, 600)))
def test_a_row_count_is_borrowed_where_its_cell_was_faster_with_our_bits(plain, addend, other):
    cells = [cell(m, ratio) for m, ratio in plain.items()]
    cells += [cell(m, ratio, "addend") for m, ratio in addend.items()]
    found, others = freeze.ranges(cells, [bits(m, "other bits") for m in other] + [bits(7, "")])
    assert others == found.get((8, 4), ())  # Of one untuned shape, its mean.
    measured = sorted({*plain, *addend})
    for m in (*range(1, 130), 511, 512, 513, 600):
        up_to = next((top for top in measured if m <= top), None)
        if up_to is None:
            assert not borrows(found, m)
            continue
        before = max((top for top in measured if top < up_to), default=0)
        faster = all(ratios.get(up_to, 0) < freeze.gain(up_to) for ratios in (plain, addend))
        same = not any(before < bad <= up_to for bad in other)
        assert borrows(found, m) == (faster and same), m


def test_what_is_written_is_what_was_found():
    ratios = {1: 2, 16: 0.8, 64: 0.9, 128: 1, 512: 0.5}
    found, others = freeze.ranges([cell(m, ratio) for m, ratio in ratios.items()], [])
    assert found == {(8, 4): ((2, 64), (129, 512))}
    module: dict[str, object] = {}
    for ranges in (found, {}, {(8, 4): ()}):
        exec(freeze.render(ranges, others), module)
        assert module["RANGES"] == ranges
        assert module["OTHERS"] == others


def test_a_tuned_shape_says_nothing_about_others():
    tuned = {"n": "4096", "k": "4096"}
    cells = [cell(64, 1.3) | tuned, cell(64, 0.5), cell(128, 0.5) | tuned, cell(128, 1.3)]
    found, others = freeze.ranges(cells, [])
    assert found == {(8, 4): ((1, 64),), (4096, 4096): ((65, 128),)}
    assert others == ((1, 64),)


def test_the_frozen_ranges_are_in_order():
    for spans in (*borrowed_ranges.RANGES.values(), borrowed_ranges.OTHERS):
        flat = [m for span in spans for m in span]
        assert flat == sorted(flat)
        assert all(m >= 1 for m in flat)
