"""Log-probabilities of answers, against one whole transformers forward per answer; and a benchmark asked with them."""

import hashlib
import io

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE
from PIL import Image

from sft.evaluation.mmbench import Row, group_rotations, rotate
from sft.evaluation.ranking import AnswerRequest, _plan, score_answers
from sft.evaluation.score import Benchmark, choose_questions, evaluate, protocol_hash
from sft.models import idefics
from sft.pixels import load_pixels
from sft.sample import ImageRef, Message


def noise(seed: int) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(source=buffer.getvalue())


def ask(*content: str | ImageRef) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


DOG, CAT = noise(1), noise(2)
ANSWERS = ("red", "red circle", "a blue square", "A", "B")
REQUESTS = [
    AnswerRequest(ask(DOG, "What is in this image?"), ANSWERS),
    AnswerRequest(ask(DOG, "Describe this image."), ANSWERS),
    AnswerRequest(ask(CAT, "What is in this image?"), ANSWERS),
    AnswerRequest(ask("What is in", CAT, "and in", DOG, "?"), ANSWERS),
    AnswerRequest(ask("What is in this image?"), ANSWERS),
]


def plain_log_prob(model, template, messages, answer):
    """One transformers forward over prompt and answer, through its own pixel and mask arguments."""
    encoded, (start, end) = template.encode_answer(messages, answer)
    ids_1T = torch.from_numpy(encoded.input_ids)[None]
    refs = [item for message in messages for item in message.content if isinstance(item, ImageRef)]
    pixels = torch.zeros(1, max(1, len(refs)), 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = torch.zeros(1, ids_1T.shape[1], pixels.shape[1])
    for number, (ref, position) in enumerate(zip(refs, encoded.image_positions, strict=True)):
        picture = load_pixels(ref.source, IMAGE_SIZE)
        pixels[0, number] = idefics.normalise(torch.tensor(picture)[None])[0]
        mask[0, position:] = 0
        mask[0, position:, number] = 1
    with torch.no_grad():
        logits = model(input_ids=ids_1T, pixel_values=pixels, image_attention_mask=mask).logits[0]
    targets = ids_1T[0, start:end]
    return logits[start - 1 : end - 1].log_softmax(-1).gather(1, targets[:, None]).sum().item()


@pytest.mark.parametrize("tokens_per_forward", [1, 100, 10_000])
def test_ranking_by_packed_segments_equals_a_whole_forward_per_answer(model, template, tokens_per_forward):
    scores = score_answers(model, template, REQUESTS, image_size=IMAGE_SIZE, tokens_per_forward=tokens_per_forward)
    for request, row in zip(REQUESTS, scores, strict=True):
        expected = [plain_log_prob(model, template, request.messages, answer) for answer in request.answers]
        assert [score.log_prob for score in row] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_only_the_answers_own_tokens_are_scored(template, tokenizer):
    segments, _ = _plan(template, REQUESTS[:1])
    read = {r.answer: tokenizer.decode(r.token_ids) for segment in segments for r in segment.readings}
    assert [read[number].strip() for number in range(len(ANSWERS))] == list(ANSWERS)


def test_all_letters_are_read_from_one_segment(template):
    segments, _ = _plan(template, [AnswerRequest(REQUESTS[0].messages, ("A", "B"))])
    assert len(segments) == 1


def test_equal_prompts_are_computed_once_and_prompts_about_other_images_are_not(template):
    letters = [AnswerRequest(request.messages, ("A", "B")) for request in REQUESTS]
    once, refs = _plan(template, letters)
    twice, same_refs = _plan(template, letters * 2)
    assert len(once) == len(twice) == 5
    assert len(refs) == len(same_refs) == 2
    assert sum(len(segment.readings) for segment in twice) == 20


def test_an_answer_under_autocast_is_scored_in_float32(model, template):
    exact = score_answers(model, template, REQUESTS, image_size=IMAGE_SIZE)
    rough = score_answers(model, template, REQUESTS, image_size=IMAGE_SIZE, autocast=True)
    found = [score.log_prob for row in rough for score in row]
    assert found == pytest.approx([score.log_prob for row in exact for score in row], rel=0.1, abs=0.5)
    steps = [value * 64 for value in found]  # bfloat16 of this size has no finer steps
    assert any(abs(step - round(step)) > 1e-3 for step in steps)


def test_asking_twice_gives_the_same_numbers_and_leaves_the_model_in_its_mode(model, template):
    model.train()
    first = score_answers(model, template, REQUESTS, image_size=IMAGE_SIZE)
    assert first == score_answers(model, template, REQUESTS, image_size=IMAGE_SIZE)
    assert model.training


def row(index: int, image: ImageRef) -> Row:
    return Row(
        index=index, question="What is in this image?", hint="", letters=("A", "B", "C"),
        options=("red circle", "blue square", "dog"), answer="B", category="toy", l2_category="", image=image,
        image_sha256=hashlib.sha256(image.source).hexdigest(),
    )  # fmt: skip


def benchmark(*rows: Row) -> Benchmark:
    questions = tuple(group_rotations(rows, "circular"))
    return Benchmark(name="toy", protocol="circular", fingerprint="file", questions=questions)


def test_blind_equals_a_prompt_without_image(model, template):
    toy = benchmark(row(1, DOG))
    blind = evaluate(model, template, toy, image_size=IMAGE_SIZE, ranks=("text",), blind=True)["text"]
    seen = evaluate(model, template, toy, image_size=IMAGE_SIZE, ranks=("text",))["text"]
    text = "Question: What is in this image?\nPossible answers:\nA: red circle\nB: blue square\nC: dog\nCorrect answer:"
    expected = [plain_log_prob(model, template, ask(text), option) for option in toy.questions[0].first.options]
    assert list(blind.questions[0].rotations[0].log_probs.values()) == pytest.approx(expected, rel=1e-5)
    assert blind.questions[0].rotations[0].log_probs != seen.questions[0].rotations[0].log_probs


def test_rankings_asked_together_equal_those_asked_alone(model, template):
    toy = benchmark(row(1, DOG), row(2, CAT))
    together = evaluate(model, template, toy, image_size=IMAGE_SIZE)
    for rank in ("text", "letter"):
        alone = evaluate(model, template, toy, image_size=IMAGE_SIZE, ranks=(rank,))[rank]
        assert alone.protocol_hash == together[rank].protocol_hash
        for one, other in zip(alone.questions, together[rank].questions, strict=True):
            for asked, again in zip(one.rotations, other.rotations, strict=True):
                assert asked.log_probs == pytest.approx(again.log_probs, rel=1e-5)
                assert asked.answer == again.answer


def test_ranking_by_text_follows_the_option_through_its_rotations(model, template):
    result = evaluate(model, template, benchmark(row(1, DOG)), image_size=IMAGE_SIZE, ranks=("text",))["text"]
    (question,) = result.questions
    assert [asked.answer for asked in question.rotations] == ["B", "A", "C"]
    for by, asked in enumerate(question.rotations):
        options = rotate(row(1, DOG), by).options
        best = max(zip(asked.log_probs.values(), options, "ABC", strict=True))
        assert asked.prediction == best[2]
    assert result.chance == pytest.approx(1 / 3)


def test_the_protocol_hash_changes_with_whatever_changes_the_score(template):
    toy = benchmark(row(1, DOG))
    other_file = Benchmark(name="toy", protocol="circular", fingerprint="other", questions=toy.questions)
    vanilla = Benchmark(name="toy", protocol="vanilla", fingerprint="file", questions=toy.questions)
    hashes = [
        protocol_hash(template, toy, rank="text", blind=False),
        protocol_hash(template, toy, rank="letter", blind=False),
        protocol_hash(template, toy, rank="text", blind=True),
        protocol_hash(template, other_file, rank="text", blind=False),
        protocol_hash(template, vanilla, rank="text", blind=False),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == protocol_hash(template, toy, rank="text", blind=False)


def test_a_part_of_the_questions_is_made_of_whole_images():
    questions = group_rotations([row(i, noise(i // 3)) for i in range(30)], "circular")
    some, more = choose_questions(questions, 10, seed=0), choose_questions(questions, 20, seed=0)
    assert len(some) == 9 and len(more) == 18
    assert {q.first.index for q in some} <= {q.first.index for q in more}
    assert {len([q for q in some if q.first.image == r.first.image]) for r in some} == {3}
    assert choose_questions(questions, 10, seed=1) != some
    assert choose_questions(questions, 100, seed=0) == questions
    assert len(choose_questions(questions, 1, seed=0)) == 3
