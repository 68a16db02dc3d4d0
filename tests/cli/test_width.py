"""Tables and plots fit a terminal of 80 columns: none of their lines is folded there."""

from io import StringIO

import pytest
from rich.console import Console

from sft.cli import leaks, mix, select
from sft.cli.evaluation_tables import show_summaries
from sft.cli.terminal import table
from sft.selection.record import CheckpointScore, Selection
from sft.training.optimizer import TrainedPart, trained_table

UNITS = ("tokens", "trained_tokens", "samples")


def source(name: str) -> dict:
    """Return a source of a mixture as large as those of the released recipes."""
    return {
        "name": name,
        "asked": 0.307,
        "achieved": 0.307,
        "achieved_in": dict.fromkeys(UNITS, 0.307),
        "epochs": 192.0,
        "error_in_packs": 1.01,
        "error_inside_in_packs": 12.31,
        "budget": {"pieces": 1_847_173, "images": 4_590_806, "bytes": 510.5e9},
        "pieces": 141_047_697,
        "held_out": {"validation": 14_104, "neither": 0},
        "filtered": {},
        "skipped": {},
        "fitted": {},
        "tokens_left_over": 331,
    }


MIXTURE = {
    "unit": "trained tokens",
    "steps": 22_000,
    "packs_per_step": 100,
    "sources": [source("image_text_pairs"), source("lrv_instruction")],
    "warnings": [],
    "largest_error_inside_in_packs": 12.3,
    "windows": {
        "count": 22_000,
        "packs": 100,
        "largest_error_inside_in_packs": [12.3] * 64,
        "largest_error_in_packs": [1.0] * 64,
    },
    "packs": {
        "count": 2_200_000,
        "fill": 0.996,
        "by_fill": [1] * 101,
        "images_per_pack": 24.0,
        "by_distinct_images": [1] * 25,
        "distinct_images_per_pack": 13.9,
        "encodes_saved": 0.258,
        "image_weight": {"mean": 13.9, "p95": 20, "most": 24},
        "left_out": 0.0123,
    },
}


def summary(name: str) -> dict:
    """Return what a model scored on a large benchmark."""
    return {
        "benchmark": name,
        "rank": "letter",
        "shots": 0,
        "questions": 214_354,
        "accuracy": 0.6384,
        "standard_error": 0.012,
        "interval": (0.1234, 0.9876),
        "blind": 0.333,
    }


SELECTION = Selection(
    by="mmbench",
    rule="earliest_not_worse",
    selected="checkpoint-20000",
    best="checkpoint-22000",
    scores=tuple(
        CheckpointScore(
            checkpoint=f"checkpoint-{step}",
            step=step,
            score=0.6384,
            standard_error=0.012,
            interval=(0.6, 0.7),
            p_best=0.5,
        )
        for step in (20_000, 22_000)
    ),
    tied=("checkpoint-20000", "checkpoint-22000"),
    benchmark="mmbench_dev_20230712",
    ranks=("letter", "text"),
    questions=1164,
    images=1164,
    cross_fitted=0.638,
    cross_fitted_interval=(0.611, 0.666),
    categories={},
)
LEAKS = {
    "benchmark": "mmbench_dev_20230712.tsv",
    "images": 1164,
    "questions": 1164,
    "leaked_questions": 12,
    "leaked_images": 12,
    "images_without_features": 0,
    "stores": [
        {
            "store": "stores/m3it-0488820d",
            "images": 1_000_000,
            "by_content": 9,
            "by_sight": 3,
            "unreadable": 0,
            "leaks": [],
        }
    ],
}


SENTENCES = ("warning", "Cross-fitted", "* checkpoint-", "= cannot", "The ", "A 95 %", "P(best) is")
"""How lines begin that a terminal folds between words."""


@pytest.mark.parametrize(
    "show",
    [
        lambda out: mix.show(MIXTURE, out),
        lambda out: show_summaries([summary("mmbench_dev_20230712"), summary("vqav2 validation")], out),
        lambda out: select.show(SELECTION, out),
        lambda out: leaks.show(LEAKS, out),
    ],
    ids=["mix", "evaluate", "select", "leaks"],
)
def test_no_row_is_folded_at_80_columns(show):
    def lines(width: int) -> list[str]:
        out = Console(file=StringIO(), width=width, highlight=False, markup=False)
        show(out)
        return [line.rstrip(" ▏▎▍▌▋▊▉█") for line in out.file.getvalue().splitlines()]

    rows = [line for line in lines(300) if not line.startswith(SENTENCES)]
    assert len(rows) > 2 and max(map(len, rows)) <= 80
    assert [row for row in rows if row not in lines(80)] == []


def test_the_table_of_what_is_trained_fits_80_columns_for_the_largest_model():
    parts = [TrainedPart("cross_attention", "weights", 1234, 79_967_857_448, 1.6e-5, "0.1 (112 at 0)", "float32")]
    assert max(map(len, trained_table(parts).splitlines())) <= 80


def test_a_title_may_be_wider_than_its_columns():
    out = Console(file=StringIO(), width=80)
    out.print(table("a title of seven words stands here", ("a",), [("1",)]))
    assert out.file.getvalue().splitlines()[0].rstrip() == "a title of seven words stands here"
