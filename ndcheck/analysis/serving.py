"""What a server's answers show: whether they are independent draws, and the batches they ran in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ndcheck.records import Sample

MAX_NAMED = 2
LARGEST_UNCOVERED_SHARE = 0.1
"""Rows that join a batch one after the other leave some of its first and last positions thin."""


@dataclass(frozen=True, slots=True)
class ReachedBatch:
    """Over all trials with ``asked`` requests: how many tokens ran in a batch of which size.

    ``n_uncovered`` of the completion's ``n_positions`` never ran in the batch asked for.
    """

    asked: int
    tokens_by_size: tuple[tuple[int, int], ...]
    n_positions: int
    n_uncovered: int

    @property
    def n_tokens(self) -> int:
        return sum(n for _, n in self.tokens_by_size)

    @property
    def n_full(self) -> int:
        return sum(n for size, n in self.tokens_by_size if size >= self.asked)

    @property
    def n_alone(self) -> int:
        return sum(n for size, n in self.tokens_by_size if size <= 1)

    @property
    def distribution(self) -> str:
        """The sizes that ran, each with its share of the tokens; those below 1 % together."""
        shares = [(size, 100 * n / self.n_tokens) for size, n in self.tokens_by_size]
        shown = [f"{size} ({share:.0f} %)" for size, share in shares if share >= 1]
        rest = [share for _, share in shares if share < 1]
        return ", ".join([*shown, *([f"others ({sum(rest):.1f} %)"] if rest else [])])


@dataclass(frozen=True, slots=True)
class ServingFinding:
    """The answers to one probe: of a server, or of this process where requests arrive at random.

    ``n_connections`` is 0 in this process.

    ``n_repeated_ids`` of ``n_ids`` and ``n_replayed`` answers were not computed for their
    requests: their response id is another's; their headers name a cache, or they came sooner than a
    first token can.
    ``prompt_sizes`` are what the server counts as the prompt's tokens. ``n_other_texts`` have the
    token ids of another answer but not its text, ``n_other_ends`` ended otherwise or after another
    number of tokens, sent or not; in ``other_fields``, which are not compared, they hold another
    text. ``ids_differ``, ``names_differ`` (None: no names) and
    ``texts_differ`` count answers unlike the reference.
    """

    n_answers: int
    n_trials: int
    n_connections: int
    fingerprints: tuple[str, ...]
    prompt_sizes: tuple[int, ...]
    n_ids: int
    n_repeated_ids: int
    n_replayed: int
    n_other_texts: int
    n_other_ends: int
    other_fields: tuple[str, ...]
    ids_differ: int
    names_differ: int | None
    texts_differ: int
    reached: tuple[ReachedBatch, ...]
    sets_batch_size: bool

    @property
    def has_own_fingerprints(self) -> bool:
        """A fingerprint that no two answers share tells nothing of the server."""
        return len(self.fingerprints) == self.n_answers > MAX_NAMED

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a clean result of these answers would show less than it seems, a sentence each."""
        found = []
        if self.n_repeated_ids:
            found.append(
                f"answers with the response id of another answer: {self.n_repeated_ids} of "
                f"{self.n_ids}: a cache repeats whole answers, turn it off"
            )
        if self.n_replayed:
            found.append(
                f"answers out of a cache, by their headers or since they came sooner than a first "
                f"token can: {self.n_replayed} of {self.n_answers}: a cache repeats whole answers, "
                "turn it off"
            )
        if self.n_other_texts:
            found.append(f"answers with equal token ids and another text: {self.n_other_texts}")
        if self.n_other_ends:
            found.append(
                "answers that are equal as far as they were sent, and ended otherwise (finish "
                f"reason, or tokens counted): {self.n_other_ends}"
            )
        if self.other_fields:
            found.append(
                "answers that are equal in what is compared differ in what is not: "
                f"{', '.join(self.other_fields)}"
            )
        if 0 < self.n_connections < self.n_trials:
            found.append(
                f"{self.n_trials} trials came through {self.n_connections} connections: no more "
                "than so many draws of a replica"
            )
        for batch in self.reached:
            if not self.sets_batch_size:
                if 2 * batch.n_alone >= batch.n_tokens:
                    found.append(
                        f"of {batch.n_tokens} positions with up to {batch.asked} requests by these "
                        f"arrivals, most ran alone: batches of {batch.distribution}"
                    )
            elif 2 * batch.n_full < batch.n_tokens:
                found.append(
                    f"thinner than asked for most of the time: of {batch.n_tokens} positions with "
                    f"{batch.asked} in flight, batches of {batch.distribution}"
                )
            elif batch.n_uncovered > LARGEST_UNCOVERED_SHARE * batch.n_positions:
                found.append(
                    f"{batch.n_uncovered} of {batch.n_positions} positions of the completion never "
                    f"ran in the batch of {batch.asked} asked for"
                )
        return tuple(found)


def server_changes(findings: Iterable[ServingFinding]) -> tuple[str, ...]:
    """What of the server did not stay the same, over the answers to all probes together."""
    findings = list(findings)
    fingerprints = (x for f in findings if not f.has_own_fingerprints for x in f.fingerprints)
    changes = []
    if len(distinct := [*map(repr, dict.fromkeys(fingerprints))]) > 1:
        first, second, *others = distinct
        more = f" and {len(others)} more" if others else ""
        changes.append(
            f"the server's system_fingerprint changed in mid-run: {first}, then {second}{more}"
        )
    for sizes in dict.fromkeys(f.prompt_sizes for f in findings if len(f.prompt_sizes) > 1):
        counted = ", then ".join(map(str, sizes[: MAX_NAMED + 1]))
        changes.append(
            f"the server counts {counted} tokens in one prompt: what it computed was not always "
            "the same (a prompt cut under load, another template)"
        )
    return tuple(changes)


class Serving:
    """Takes in the samples of one probe and arm, the reference before the others."""

    def __init__(self) -> None:
        self._n_answers = 0
        self._trials: set[int] = set()
        self._connections: set[str] = set()
        self._fingerprints: dict[str, None] = {}
        self._prompt_sizes: dict[int, None] = {}
        self._ids: Counter[str] = Counter()
        self._n_replayed = 0
        self._texts: dict[int, int] = {}
        self._n_other_texts = 0
        self._ends: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._n_other_ends = 0
        self._beside: dict[int, set[str]] = {}
        self._names: dict[int, str] = {}
        self._other_fields: dict[str, None] = {}
        self._reference: Sample | None = None
        self._differ = Counter[str]()
        self._sizes: dict[int, Counter[int]] = {}
        self._covered: dict[int, set[int]] = {}
        self._n_positions: Counter[int] = Counter()

    def add(self, sample: Sample) -> None:
        """Count a sample; one with an error is no answer."""
        witness = sample.witness
        if sample.error is not None:
            return
        if witness.response_id:
            self._ids[witness.response_id] += 1
        if sample.role == "control":  # Its tokens were changed on purpose.
            return
        self._n_answers += 1
        self._trials.add(sample.trial_id)
        if witness.connection:
            self._connections.add(witness.connection)
        if witness.fingerprint:
            self._fingerprints.setdefault(witness.fingerprint)
        if witness.n_prompt_tokens is not None:
            self._prompt_sizes.setdefault(witness.n_prompt_tokens)
        self._n_replayed += witness.is_replayed
        ids, text, end = hash(sample.token_ids), hash(sample.text), sample.finish_reason
        self._n_other_texts += self._texts.setdefault(ids, text) != text
        n_counted = self._counts.get(ids) if witness.n_counted is None else witness.n_counted
        if n_counted is not None:
            n_counted -= self._counts.setdefault(ids, n_counted)
        is_other_end = self._ends.setdefault(ids, end) != end or bool(n_counted)
        self._n_other_ends += is_other_end
        beside, names = {*witness.beside.split()}, witness.names_digest
        if not is_other_end:  # Its reason has other words then.
            differing = self._beside.setdefault(ids, beside) ^ beside
            self._other_fields |= dict.fromkeys(x.partition("=")[0] for x in sorted(differing))
        if names and self._names.setdefault(ids, names) != names:
            self._other_fields["names of tokens"] = None
        if self._reference is None:
            self._reference = sample
        first = self._reference
        self._differ["ids"] += sample.token_ids != first.token_ids
        self._differ["names"] += witness.names_digest != first.witness.names_digest
        self._differ["texts"] += sample.text != first.text
        self._add_sizes(sample.load.batch_size, witness.step_batch_sizes)

    def _add_sizes(self, asked: int, sizes: tuple[int, ...]) -> None:
        if asked == 1 or not sizes:
            return
        self._sizes.setdefault(asked, Counter()).update(sizes)
        covered = self._covered.setdefault(asked, set())
        self._n_positions[asked] = max(self._n_positions[asked], len(sizes))
        if len(covered) < self._n_positions[asked]:
            covered.update(i for i, size in enumerate(sizes) if size >= asked)

    def finding(self, *, sets_batch_size: bool) -> ServingFinding | None:
        """What was found; None without an answer."""
        if not self._n_answers or self._reference is None:
            return None
        has_names = bool(self._reference.witness.names_digest)
        return ServingFinding(
            n_answers=self._n_answers,
            n_trials=len(self._trials),
            n_connections=len(self._connections),
            fingerprints=tuple(self._fingerprints),
            prompt_sizes=tuple(self._prompt_sizes),
            n_ids=self._ids.total(),
            n_repeated_ids=sum(n for n in self._ids.values() if n > 1),
            n_replayed=self._n_replayed,
            n_other_texts=self._n_other_texts,
            n_other_ends=self._n_other_ends,
            other_fields=tuple(self._other_fields),
            ids_differ=self._differ["ids"],
            names_differ=self._differ["names"] if has_names else None,
            texts_differ=self._differ["texts"],
            reached=tuple(
                ReachedBatch(
                    asked,
                    tuple(sorted(self._sizes[asked].items())),
                    self._n_positions[asked],
                    self._n_positions[asked] - len(self._covered[asked]),
                )
                for asked in sorted(self._sizes)
            ),
            sets_batch_size=sets_batch_size,
        )
