"""Which tiles of queries a program of `prefill_hopper` computes, and in which order.

Those that see most keys come first, to and fro over the programs, so that all see about as many.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK_Q = gl.constexpr(128)
"""Queries of a tile."""


@gluon.jit
def tile_count(tiles):
    """How many of all tiles are this program's."""
    programs = gl.num_programs(0)
    rounds = tiles // programs
    return rounds + (_place(rounds) < tiles % programs).to(gl.int32)


@gluon.jit
def _place(turn):
    """Where this program stands in a round of tiles: every other one goes backwards."""
    pid = gl.program_id(0)
    return gl.where(turn % 2 == 0, pid, gl.num_programs(0) - 1 - pid)


@gluon.jit
def tile_at(tile, batches, heads, q_blocks):
    """Head, batch and first query of this program's tile of that number."""
    index = tile * gl.num_programs(0) + _place(tile)
    rest = index // heads
    return index % heads, rest % batches, (q_blocks - 1 - rest // batches) * BLOCK_Q
