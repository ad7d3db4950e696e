"""Projections exchanged in place of gradients: equal to plain DDP for every registered method that allows it; and torch's PowerSGD."""

import pytest
from ranks import Ranks

from tare.methods import registry

# What is stepped from R alone. A method that joins the registry is asked too, and must say which it is.
PROJECTS = {"dct-adamw", "galore", "galore-8bit", "galore-adafactor", "q-galore"}
CODES = {
    "galore-8bit",
    "q-galore",
}  # moments in codes with scales in fp32, of which a last bit may turn with the last bit of R


def test_every_method_equals_plain_ddp_or_is_refused_with_the_reason(ranks2: Ranks) -> None:
    for found in ranks2.run("work_hooks_projected", "every_method"):
        assert set(found) == set(registry.keys("gradient"))
        assert {key for key, value in found.items() if not isinstance(value, str)} >= PROJECTS
        for key, value in found.items():
            if isinstance(value, str):
                assert value.startswith("Projected: no leaf can be stepped from its projection ("), f"{key}: {value}"
                assert "\n" not in value
                continue
            weights, states, sent, whole, why, words = value
            assert weights <= (1e-8 if key in CODES else 1e-12), f"{key}: weights differ by {weights:.3g}"
            assert states <= 1e-12 or key in CODES, f"{key}: states differ by {states:.3g}"
            assert sent[0] == whole, key  # the first step computes all bases
            assert sent[1] < whole, key
            assert all(why[name] for name in ("embed.weight", "norm.weight", "up.bias")), key
            assert not why["up.weight"], key
            assert (
                words
                == f"projections of {sum(not r for r in why.values())} leaves, {sum(map(bool, why.values()))} whole"
            )


def test_bytes_of_steps_are_those_of_projections(ranks2: Ranks) -> None:
    for found in ranks2.run("work_hooks_projected", "bytes_of_galore"):
        sent, whole = found
        # up [20, 8], down [8, 20] and square [8, 8] at rank 2 leave 40, 40 and 16 numbers of 160, 160 and 64; refreshes are whole
        small = whole - 8 * (384 - 96)
        assert sent == [whole, small, small, whole, small]


def test_equals_plain_ddp_under_options(ranks2: Ranks) -> None:
    for found in ranks2.run("work_hooks_projected", "options_of"):
        assert len(found) == 7
        for name, gap in found.items():
            assert gap <= 1e-12, f"{name}: {gap:.3g}"


def test_coupled_decay_and_drawn_bases_which_never_send_the_whole(ranks2: Ranks) -> None:
    for gap, sent, projected in ranks2.run("work_hooks_projected", "coupled"):
        assert gap <= 1e-12
        assert sent == [projected] * len(sent)


def test_micro_batches_in_no_sync(ranks2: Ranks) -> None:
    assert max(ranks2.run("work_hooks_projected", "accumulated")) <= 1e-12


@pytest.mark.parametrize("how", ["optimizer", "model", "hand"])
def test_a_step_that_is_dropped_leaves_nothing_behind(ranks2: Ranks, how: str) -> None:
    for view in (False, True):
        assert max(ranks2.run("work_hooks_projected", "dropped", how=how, view=view)) <= 1e-12


def test_misuse_is_told_in_a_line(ranks2: Ranks) -> None:
    words = ("no_sync()", "no_sync()", "got AdamW", "release=True", "not a parameter of this optimizer")
    for said in ranks2.run("work_hooks_projected", "mixed_up"):
        assert len(said) == len(words)
        for line, word in zip(said, words, strict=True):
            assert word in line
            assert "\n" not in line


def test_a_nan_on_one_rank_shows_on_all(ranks2: Ranks) -> None:
    assert ranks2.run("work_hooks_projected", "not_a_number") == [(True, True)] * 2


def test_powersgd_is_that_of_torch_and_its_bytes_are_counted(ranks2: Ranks) -> None:
    for same, (seen, counted, calls, said, whole) in ranks2.run("work_hooks_projected", "as_torch"):
        assert same
        assert seen == counted < whole / 2
        assert calls == said


def test_powersgd_goes_on_from_its_state(ranks2: Ranks) -> None:
    for rank, found in enumerate(ranks2.run("work_hooks_projected", "restored")):
        assert found["same"]
        assert found["rows"] == ({2} if rank == 0 else None)
        assert found["whole"]
        assert found["kept"]
        assert found["small"]
        assert found["draws"] == 624
        assert "bucket_cap_mb" in found["said"]
