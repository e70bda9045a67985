"""What of a server's answers did not stay the same from the first to the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ndcheck.probe import Prompt
from ndcheck.samplers.endpoint.answers.answer import Answer


class Changes:
    """Takes in the answers to probes; ``prompt_ids`` are the token ids that prompts had at first.

    What is compared there are answers of one kind: some servers name a model otherwise in a stream.
    """

    def __init__(self, prompt_ids: Mapping[Prompt, Sequence[int]]) -> None:
        self.n_without_bits = self.n_rounded = 0
        self._prompt_ids = prompt_ids
        self._n_other_prompts = 0
        self._served: dict[bool, dict[str, None]] = {True: {}, False: {}}

    def add(self, prompt: Prompt, answer: Answer, *, is_streamed: bool) -> None:
        """Count an answer to ``prompt``."""
        if answer.served:
            self._served[is_streamed].setdefault(answer.served)
        known, now = self._prompt_ids.get(prompt), answer.prompt_token_ids
        self._n_other_prompts += bool(known and now and now != known)

    def sentences(self, n_other_beginnings: int, *, bits_count: bool, draws: bool) -> Iterator[str]:
        """A sentence for each kind of change, that among the first requests included.

        ``draws``: the server was not asked to be greedy.
        """
        if n_other_beginnings:
            seed = "the server draws by more than the seed, " if draws else ""
            yield (
                "completions that differ in their limit alone began otherwise (requests: "
                f"{n_other_beginnings}): {seed}replicas differ, or a cache repeats answers to "
                "equal requests"
            )
        if self.n_without_bits and bits_count:
            yield (
                f"answers whose log-probabilities were no numbers: {self.n_without_bits}; their "
                "bits were not compared"
            )
        if self.n_rounded and bits_count:
            yield (
                "answers whose log-probabilities were rounded otherwise than before: "
                f"{self.n_rounded}; their bits were not compared"
            )
        for served in self._served.values():
            if len(served) > 1:
                first, second, *others = map(repr, served)
                more = f" and {len(others)} more" if others else ""
                yield (
                    f"answers name more than one model or provider: {first}, {second}{more}: "
                    "ask for one, without fallbacks"
                )
        if self._n_other_prompts:
            yield (
                f"prompts that had other tokens than at first: {self._n_other_prompts}: the "
                "server's chat template says the date, or was changed"
            )
