"""What `ndcheck shrink` found, as text and as JSON values."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ndcheck.explain.failing import Failure
from ndcheck.explain.reproduction_script import Reproduction
from ndcheck.explain.shrinking import Batch, Shrunk
from ndcheck.reports.untrusted import quoted, visible
from ndcheck.reports.wording.phrases import count

SCHEMA_VERSION = 1


def shrink_document(failure: Failure, shrunk: Shrunk, reproduction: Reproduction) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": failure.run.run_id,
        "sample_id": failure.sample.sample_id,
        **asdict(shrunk),
        "script": str(reproduction.path),
        "script_shows_it": reproduction.shows_it,
        "script_output": reproduction.output,
    }


def shrink_lines(
    failure: Failure,
    shrunk: Shrunk,
    reproduction: Reproduction,
    decode: Callable[[int], str],
    width: int,
) -> Iterator[str]:
    """The screen: both sizes, both tokens, and the script that shows them."""
    verdict = "SHOWN" if reproduction.shows_it else "NOT SHOWN"
    yield f"{verdict}  by {visible(str(reproduction.path))}"
    yield ""
    yield f"sample  {failure.sample.sample_id} of {visible(failure.run.run_id)}"
    yield f"before  {_size(shrunk.before)}"
    yield f"after   {_size(shrunk.batch)}, in {count(shrunk.n_tests, 'test')}"
    for index, row in enumerate(shrunk.batch.rows):
        role = "probe" if index == shrunk.batch.slot else "other"
        yield f"  row {index}  {role}  {', '.join(map(str, row))}"[:width]
    alone, batched = (
        f"{token} {quoted(decode(token), 20)}"
        for token in (shrunk.token_alone, shrunk.token_batched)
    )
    what = f"bits differ, token {alone}" if shrunk.is_latent else f"alone {alone}, here {batched}"
    yield f"token {shrunk.position + 1}: {what}"
    if not reproduction.shows_it:
        yield ""
        yield "The script ended otherwise:"
        for line in reproduction.output.splitlines()[-3:]:
            yield from textwrap.wrap(visible(line), width - 2, initial_indent="  ")


def _size(batch: Batch) -> str:
    rows, tokens = batch.size
    what = "scored" if batch.scores else "prefill"
    prefill = "" if batch.cache_state == "whole" else f", {batch.cache_state} {what}"
    if batch.width > 1:
        prefill = f", fed again in passes of {batch.width}"
    elif batch.scores and not prefill:
        prefill = ", scored in one pass"
    return (
        f"{count(rows, 'row')}, {count(tokens, 'token')} beside the probe, "
        f"{batch.n_tokens} decoded{prefill}"
    )
