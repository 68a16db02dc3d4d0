"""Log-probabilities of answers, against one whole transformers forward per answer; and a benchmark asked with them."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, REPOSITORY, loaded_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sft.core.errors import RunError
from sft.core.sample import ImageRef, Message, Sample
from sft.evaluation import run_tasks
from sft.evaluation.draw_images import choose_part
from sft.evaluation.rank_answers import _forwards, _lay, _Path, _plan, score_answers
from sft.evaluation.results import Result
from sft.evaluation.run_tasks import ask
from sft.evaluation.task import AnswerScore, Query
from sft.evaluation.tasks.mmbench.benchmark import Benchmark
from sft.evaluation.tasks.mmbench.multiple_choice import (
    MMBench,
    asked_rows,
    chance,
    predicted_letters,
)
from sft.evaluation.tasks.mmbench.protocols import group_rows, query
from sft.evaluation.tasks.mmbench.questions import Row, rotate
from sft.inference.generate import generate, prompt_of
from sft.models.idefics.images import normalise
from sft.models.image_transform import load_tiles


def noise(seed: int) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(source=buffer.getvalue())


def asking(*content: str | ImageRef) -> Sample:
    return Sample(key="toy", messages=(Message(role="user", content=content),))


DOG, CAT = noise(1), noise(2)
ANSWERS = ("red", "red circle", "a blue square", "A", "B")
REQUESTS = [
    Query(asking(DOG, "What is in this image?"), ANSWERS),
    Query(asking(DOG, "Describe this image."), ANSWERS),
    Query(asking(CAT, "What is in this image?"), ANSWERS),
    Query(asking("What is in", CAT, "and in", DOG, "?"), ANSWERS),
    Query(asking("What is in this image?"), ANSWERS),
]


def plain_log_prob(model, template, sample, answer):
    """One transformers forward over prompt and answer, through its own pixel and mask arguments."""
    encoded, (start, end) = template.encode_answer(sample.messages, answer)
    ids_1T = torch.from_numpy(encoded.input_ids)[None]
    refs = sample.images
    pixels = torch.zeros(1, max(1, len(refs)), 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = torch.zeros(1, ids_1T.shape[1], pixels.shape[1])
    for number, (ref, position) in enumerate(zip(refs, encoded.image_positions, strict=True)):
        pixels[0, number] = normalise(torch.tensor(load_tiles(ref.source, template.images)))[0]
        mask[0, position:] = 0
        mask[0, position:, number] = 1
    with torch.no_grad():
        logits = model(input_ids=ids_1T, pixel_values=pixels, image_attention_mask=mask).logits[0]
    targets = ids_1T[0, start:end]
    return logits[start - 1 : end - 1].log_softmax(-1).gather(1, targets[:, None]).sum().item()


@pytest.mark.parametrize("tokens_per_forward", [1, 100, 10_000])
def test_ranking_by_packed_segments_equals_a_whole_forward_per_answer(model, template, tokens_per_forward):
    scores = score_answers(model, template, REQUESTS, tokens_per_forward=tokens_per_forward)
    for request, row in zip(REQUESTS, scores, strict=True):
        expected = [plain_log_prob(model, template, request.sample, answer) for answer in request.options]
        assert [score.log_prob for score in row] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def laid(template, requests, tokens_per_forward=10_000):
    """The forwards of these requests, and how many images there are."""
    paths, refs, _ = _plan(template, requests, None)
    return list(_forwards(paths, tokens_per_forward)), len(refs)


def test_only_the_answers_own_tokens_are_scored(template, tokenizer):
    (forward,), _ = laid(template, REQUESTS[:1])
    read = {path.answer: tokenizer.decode(path.token_ids).strip() for path in forward.paths}
    assert [read[number] for number in range(len(ANSWERS))] == list(ANSWERS)


def test_letters_are_read_from_one_pass_over_the_prompt(template):
    (forward,), _ = laid(template, [Query(REQUESTS[0].sample, ("B", "C", "D"))])
    _, (_, end) = template.encode_answer(REQUESTS[0].sample.messages, "B")
    assert len(forward.tokens_T) == end - 1  # all but the letter; in this vocabulary a space stands before it
    assert len(forward.sequences) == 1


def test_what_prompts_have_in_common_from_their_beginning_is_computed_once(template):
    alone = [len(laid(template, [request])[0][0].tokens_T) for request in REQUESTS]
    (together,), num_images = laid(template, REQUESTS)
    ids = [template.encode_prompt(request.sample.messages).input_ids.tolist() for request in REQUESTS]
    first_different = next(i for i, (one, other) in enumerate(zip(ids[0], ids[1], strict=False)) if one != other)
    (dogs,), _ = laid(template, REQUESTS[:2])
    assert len(dogs.tokens_T) == alone[0] + alone[1] - first_different
    assert len(together.tokens_T) < sum(alone)
    (twice,), same_images = laid(template, REQUESTS * 2)
    assert len(twice.tokens_T) == len(together.tokens_T)
    assert num_images == same_images == 2


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=8))
def test_laid_paths_read_as_they_were_and_no_beginning_twice(paths):
    one = np.array([1])
    forward = _lay([_Path(n, 0, np.array(own), len(own) - 1, one, -np.ones(len(own))) for n, own in enumerate(paths)])
    for path, place in zip(forward.paths, forward.places, strict=True):
        assert forward.tokens_T[place].tolist() == paths[path.request]
        assert forward.positions_T[place].tolist() == list(range(len(place)))
    beginnings = {tuple(tokens[:end]) for tokens in paths for end in range(1, len(tokens) + 1)}
    assert len(forward.tokens_T) == len(beginnings)
    assert {place for sequence in forward.sequences for place in sequence.tolist()} == set(range(len(beginnings)))


def test_what_asks_about_an_image_shares_a_forward_where_it_fits(template):
    requests = [Query(asking(image, text), ("A", "B")) for text in "xyz" for image in (DOG, CAT)]
    forwards, _ = laid(template, requests, tokens_per_forward=60)
    assert len(forwards) == 2
    assert [len(np.unique(forward.tokens_T // 2**32)) for forward in forwards] == [2, 2]  # an image, and none before it


def test_an_answer_under_autocast_is_scored_in_float32(model, template):
    exact = score_answers(model, template, REQUESTS)
    rough = score_answers(model, template, REQUESTS, autocast=True)
    found = [score.log_prob for row in rough for score in row]
    assert found == pytest.approx([score.log_prob for row in exact for score in row], rel=0.1, abs=0.5)
    steps = [value * 64 for value in found]  # bfloat16 of this size has no finer steps
    assert any(abs(step - round(step)) > 1e-3 for step in steps)


def test_asking_twice_gives_the_same_numbers_and_leaves_the_model_in_its_mode(model, template):
    model.train()
    first = score_answers(model, template, REQUESTS)
    assert first == score_answers(model, template, REQUESTS)
    assert model.training


def row(index: int, image: ImageRef) -> Row:
    return Row(
        index=index, question="What is in this image?", hint="", letters=("A", "B", "C"),
        options=("red circle", "blue square", "dog"), answer="B", category="toy", l2_category="", image=image,
        image_sha256=hashlib.sha256(image.source).hexdigest(),
    )  # fmt: skip


def benchmark(*rows: Row, protocol="circular", **fields) -> Benchmark:
    questions = tuple(group_rows(rows, protocol))
    return Benchmark(name="toy", protocol=protocol, fingerprint="file", questions=questions, **fields)


def evaluate(model, template, toy: Benchmark, *, ranks=("letter",), blind=False, **options) -> dict[str, Result]:
    """The result by each scoring; those by likelihood are asked together."""
    tasks = {rank: MMBench(toy, rank) for rank in ranks}
    tasks = {rank: task.without_images() if blind else task for rank, task in tasks.items()}
    answers = ask(loaded_of(model, template, **options), [*tasks.values()])
    return {rank: task.result(answers[task], task.protocol_hash(template), "") for rank, task in tasks.items()}


def protocol_hash(template, toy: Benchmark, *, rank: str, blind: bool) -> str:
    task = MMBench(toy, rank)
    return (task.without_images() if blind else task).protocol_hash(template)


def test_blind_equals_a_prompt_without_image(model, template):
    toy = benchmark(row(1, DOG))
    blind = evaluate(model, template, toy, ranks=("text",), blind=True)["text"]
    seen = evaluate(model, template, toy, ranks=("text",))["text"]
    text = "Question: What is in this image?\nPossible answers:\nA: red circle\nB: blue square\nC: dog\nCorrect answer:"
    expected = [plain_log_prob(model, template, asking(text), option) for option in toy.questions[0].first.options]
    assert list(asked_rows(blind.outcomes[0])[0].log_probs.values()) == pytest.approx(expected, rel=1e-5)
    assert asked_rows(blind.outcomes[0])[0].log_probs != asked_rows(seen.outcomes[0])[0].log_probs


def test_rankings_asked_together_equal_those_asked_alone(model, template):
    toy = benchmark(row(1, DOG), row(2, CAT))
    together = evaluate(model, template, toy, ranks=("text", "letter"))
    for rank in ("text", "letter"):
        alone = evaluate(model, template, toy, ranks=(rank,))[rank]
        assert alone.protocol_hash == together[rank].protocol_hash
        for one, other in zip(alone.outcomes, together[rank].outcomes, strict=True):
            for asked, again in zip(asked_rows(one), asked_rows(other), strict=True):
                assert asked.log_probs == pytest.approx(again.log_probs, rel=1e-5)
                assert asked.answer == again.answer


def test_ranking_by_text_follows_the_option_through_its_rotations(model, template):
    result = evaluate(model, template, benchmark(row(1, DOG)), ranks=("text",))["text"]
    (question,) = result.outcomes
    assert [asked.answer for asked in asked_rows(question)] == ["B", "A", "C"]
    for by, asked in enumerate(asked_rows(question)):
        options = rotate(row(1, DOG), by).options
        best = max(zip(asked.log_probs.values(), options, "ABC", strict=True))
        assert asked.prediction == best[2]
    assert chance(result) == pytest.approx(1 / 3)


def test_the_card_compares_all_four_letters_of_every_row(model, template):
    toy = benchmark(row(1, DOG), rotate(row(1, DOG), 1), protocol="card")
    result = evaluate(model, template, toy)["letter"]
    assert [list(asked_rows(question)[0].log_probs) for question in result.outcomes] == [list("ABCD")] * 2
    summary = MMBench(toy, "letter").summary(result)
    assert (chance(result), len(result.outcomes), summary["questions"]) == (0.25, 2, 1)
    assert summary["deviations"] == ["the `.` and <end_of_utterance> after the letter are not scored"]


def test_written_answers_are_those_of_generation(model, template):
    toy = benchmark(row(1, DOG), row(2, CAT))
    result = evaluate(model, template, toy, ranks=("generate",))["generate"]
    rows = [row for question in toy.questions for row in question.rotations]
    texts = [asked.text for question in result.outcomes for asked in asked_rows(question)]
    prompt = prompt_of(template, query(rows[4], "circular", "generate").messages)
    (expected,) = generate(model, template.tokenizer, [prompt], max_new_tokens=64)
    assert texts[4] == expected
    assert chance(result) == pytest.approx(1 / 3)


def test_what_is_not_finite_is_wrong_and_counted_and_a_model_that_diverged_is_named(model, template, monkeypatch):
    toy = benchmark(row(1, DOG), row(2, CAT))

    def ranked(requests):
        found = score_answers(model, template, requests)
        return [[AnswerScore(math.nan, 1), *found[0][1:]], *found[1:]]

    monkeypatch.setattr(run_tasks, "score_answers", lambda model, template, requests, **options: ranked(requests))
    result = evaluate(model, template, toy)["letter"]
    first = asked_rows(result.outcomes[0])[0]
    assert (first.prediction, first.log_probs, result.outcomes[0].score) == ("", {}, 0)
    assert first.letters == ["A", "B", "C"] and chance(result) == pytest.approx(1 / 3)
    summary = MMBench(toy, "letter").summary(result)
    assert (summary["not_finite"], predicted_letters(result)["none"]) == (1, pytest.approx(1 / 6))
    monkeypatch.undo()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(RunError, match="toy: the model gives no finite likelihood to any answer"):
        evaluate(model, template, toy)


def test_shots_are_read_before_the_question(model, template):
    shot = row(9, CAT)
    toy = benchmark(row(1, DOG), shots=1, support=(shot,))
    result = evaluate(model, template, toy)["letter"]
    sample = query(toy.questions[0].first, "circular", "letter", shots=[shot])
    assert sample.images == (CAT, DOG)
    expected = [plain_log_prob(model, template, sample, letter) for letter in "ABC"]
    assert list(asked_rows(result.outcomes[0])[0].log_probs.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", ["letter", "generate"])
def test_questions_longer_than_the_models_positions_are_counted_by_name(model, template, rank):
    short, long = row(1, DOG), replace(row(2, CAT), hint="A dog and a cat. " * 20)
    lengths = [len(template.encode_prompt(query(r, "circular", rank).messages).input_ids) for r in (short, long)]
    options = dict(ranks=(rank,), max_positions=lengths[1])
    result = evaluate(model, template, benchmark(short, long), **options)[rank]
    assert [question.item for question in result.outcomes] == [1]
    assert result.filtered == {"longer than the model's positions": [2]}
    with pytest.raises(RunError, match="toy: all 1 questions are longer than the model's positions"):
        evaluate(model, template, benchmark(long), **options)


def test_the_protocol_hash_changes_with_whatever_changes_the_score(template):
    toy = benchmark(row(1, DOG))
    others = [
        replace(toy, fingerprint="other"),
        replace(toy, protocol="vanilla"),
        replace(toy, protocol="card"),
        replace(toy, shots=1),
        replace(toy, shots=2),
    ]
    hashes = [
        protocol_hash(template, toy, rank="text", blind=False),
        protocol_hash(template, toy, rank="letter", blind=False),
        protocol_hash(template, toy, rank="generate", blind=False),
        protocol_hash(template, toy, rank="text", blind=True),
        *(protocol_hash(template, other, rank="letter", blind=False) for other in others),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == protocol_hash(template, toy, rank="text", blind=False)


def test_a_part_of_the_questions_is_made_of_whole_images():
    questions = group_rows([row(i, noise(i // 3)) for i in range(30)], "circular")
    some, more = choose_part(questions, 10, seed=0), choose_part(questions, 20, seed=0)
    assert len(some) == 9 and len(more) == 18
    assert {q.first.index for q in some} <= {q.first.index for q in more}
    assert {len([q for q in some if q.first.image == r.first.image]) for r in some} == {3}
    assert choose_part(questions, 10, seed=1) != some
    assert choose_part(questions, 100, seed=0) == questions
    assert len(choose_part(questions, 1, seed=0)) == 3


# ----------------------------------------------------------------------------------------------- two processes

ON_A_RANK = """
import json, sys
from conftest import IMAGE_SIZE, REPOSITORY, TOY_IMAGES, base_tokenizer, make_tiny_model
from sft.models.idefics.text import CHAT_TEMPLATE, END_OF_UTTERANCE
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.core.distributed import process_group
from sft.core.distributed import from_main, all_or_none
from test_rank_answers import results_of

tokenizer = base_tokenizer()
tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
template = ChatTemplate(load_chat_template(REPOSITORY / "chat_templates" / CHAT_TEMPLATE), tokenizer, TOY_IMAGES)
with process_group() as process:
    found = results_of(make_tiny_model(tokenizer), template)
    found["failed"] = []
    for failing in (0, 1):
        try:
            with all_or_none():
                if process.number == failing:
                    raise ValueError("out of\\nmemory")
        except Exception as error:
            found["failed"].append(f"{type(error).__name__}: {error}")
    found["told"] = from_main(lambda: process.number)
with open(f"{sys.argv[1]}/{process.number}.json", "w") as file:
    json.dump(found, file)
"""


def results_of(model, template) -> dict:
    """What a process finds, and how many forwards it runs."""
    num_forwards = 0

    def count(*_) -> None:
        nonlocal num_forwards
        num_forwards += 1

    handle = model.register_forward_pre_hook(count)
    toy = benchmark(*(row(number, noise(number)) for number in range(5)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_tasks, "score_answers", partial(score_answers, tokens_per_forward=200))
        ranked = evaluate(model, template, toy, ranks=("letter", "text"))
    handle.remove()
    written = evaluate(model, template, benchmark(row(1, DOG)), ranks=("generate",))
    asked = [asdict(question) for result in (*ranked.values(), *written.values()) for question in result.outcomes]
    return {"forwards": num_forwards, "questions": json.loads(json.dumps(asked))}


@pytest.mark.slow
def test_two_processes_find_what_one_finds_in_half_the_forwards(model, template, tmp_path):
    (tmp_path / "on_a_rank.py").write_text(ON_A_RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "evaluation")])
    subprocess.run(
        [*launch, str(tmp_path / "on_a_rank.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    alone = results_of(model, template)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["questions"] == second["questions"] == alone["questions"]
    assert first["forwards"] == second["forwards"] == math.ceil(alone["forwards"] / 2)
    assert alone["forwards"] % 2 == 1, "a process is left short in the last round"
    broken = "ValueError: out of\nmemory"
    assert first["failed"] == [broken, "RunError: process 1 of 2: ValueError: out of memory"], "none waits for it"
    assert second["failed"] == ["RunError: process 0 of 2: ValueError: out of memory", broken]
    assert first["told"] == second["told"] == 0
