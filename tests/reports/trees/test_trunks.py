from __future__ import annotations

from ndcheck.reports.trees.trunks import find_trunk, walk


def outline(trunk):
    return [
        (parting.position, parting.n_staying, [leaving.n_samples for leaving in parting.exits])
        for parting in trunk.partings
    ]


def test_the_reference_is_followed_and_the_rest_leaves_it(two_arms) -> None:
    probe = two_arms.summary.probes[0]
    trunk = find_trunk(probe, 100)
    assert trunk.is_reference
    assert trunk.completion.completion_id == 1
    assert outline(trunk) == [(102, 192, [8]), (110, 190, [2])]
    assert trunk.text(-1) == "".join(probe.completions[0].token_texts[:102])
    leaving = trunk.partings[0].exits[0]
    assert leaving.text(-1) == "".join(leaving.completion.token_texts[102:])
    assert leaving.partings == ()


def test_all_texts_along_a_trunk_are_its_completion(many) -> None:
    for trunk, parent in walk(find_trunk(many.summary.probes[0], 1000)):
        own = "".join(trunk.text(i) for i in range(-1, len(trunk.partings)))
        before = parent.completion.token_texts[: trunk.start] if parent else ()
        assert "".join(before) + own == trunk.completion.text


def test_every_completion_is_there_once_and_counts_add_up(many) -> None:
    probe = many.summary.probes[0]
    trunk = find_trunk(probe, 1000)
    found = [part.completion.completion_id for part, _ in walk(trunk)]
    assert sorted(found) == list(range(1, 81))
    for part, _ in walk(trunk):
        for parting in part.partings:
            assert parting.n_left_out == 0


def test_what_is_left_out_is_counted(many) -> None:
    probe = many.summary.probes[0]
    trunk = find_trunk(probe, 5)
    assert len(list(walk(trunk))) < 10
    n_leaving = sum(leaving.n_samples for p in trunk.partings for leaving in p.exits)
    n_left_out = sum(parting.n_left_out for parting in trunk.partings)
    # Forks between completions that are all left out are not on the trunk.
    assert probe.n_samples - n_leaving - n_left_out >= trunk.completion.count


def test_a_thousand_forks_in_a_row_are_one_flat_trunk(stairs) -> None:
    trunk = find_trunk(stairs.summary.probes[0], 1000)
    assert [parting.position for parting in trunk.partings] == list(range(1, 1000))
    assert all(not leaving.partings for p in trunk.partings for leaving in p.exits)


def test_without_completions_there_is_no_trunk(all_errors) -> None:
    assert find_trunk(all_errors.summary.probes[0], 10) is None
