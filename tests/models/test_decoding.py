import pytest
import torch
from transformers import DynamicCache

from tests.random_qwen import make_random_qwen
from vgid.data.fictitious import generation_questions, make_world, portrait
from vgid.models.backbones import Backbone, load
from vgid.models.decoding import (
    MAX_NEW_TOKENS,
    greedy_decode,
    greedy_tokens,
    reading_at,
    response_text,
    score_responses,
)
from vgid.models.encoding import Encoded, Query, Shot, encode, response_ids
from vgid.models.packing import Packed, hidden_states, pack
from vgid.prompts import cloze_text, generation_text

NEW_TOKENS = 9


def make_queries() -> list[Query]:
    people = make_world(0).people[:4]
    queries = []
    for index, person in enumerate(people):
        image = portrait(0, person)
        queries += [
            Query(f"{index}/a", generation_text("Who is it?", "image"), image),
            Query(
                f"{index}/b", cloze_text("The person in the image, as seen, lives in __."), image
            ),
            Query(f"{index}/c", generation_text(f"Where does {person.name} live?", "text"), None),
        ]
    return queries


@pytest.fixture(scope="module")
def encoded(random_backbone: Backbone) -> list[Encoded]:
    return encode(random_backbone, make_queries())


@torch.no_grad()
def full_logits(backbone: Backbone, item: Encoded, response: list[int]) -> torch.Tensor:
    """Logits of every position of one unpadded sequence, from the plain forward pass."""
    ids = torch.tensor([item.prompt_ids + response])
    return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **item.vision).logits[
        0
    ]


def greedy_by_hand(backbone: Backbone, item: Encoded, length: int) -> list[int]:
    """One token after the other, without cache, batch or padding."""
    response: list[int] = []
    for _ in range(length):
        token = int(full_logits(backbone, item, response)[-1].argmax())
        if token == backbone.processor.tokenizer.eos_token_id:
            break
        response.append(token)
    return response


def test_batched_answers_equal_single_token_by_token(random_backbone, encoded):
    batched = greedy_tokens(random_backbone, encoded, NEW_TOKENS, batch_size=5)
    assert batched == [greedy_by_hand(random_backbone, item, NEW_TOKENS) for item in encoded]
    assert len({tuple(tokens) for tokens in batched}) > 3  # the prompts matter


def test_the_embedded_backbones_batched_answers_equal_single_token_by_token():
    backbone = load("tiny-llava")
    queries = [
        Query(f"{person.id}/{number}", generation_text(question, form), image)
        for person in make_world(0).people[:2]
        for number, (question, _, form) in enumerate(generation_questions(person, False))
        for image in [portrait(0, person) if form == "image" else None]
    ]
    encoded = encode(backbone, queries)
    batched = greedy_tokens(backbone, encoded, batch_size=len(encoded))
    assert batched == [greedy_by_hand(backbone, item, MAX_NEW_TOKENS) for item in encoded]
    assert len({len(tokens) for tokens in batched}) > 3  # rows end at different times


@pytest.mark.parametrize("batch_size", [1, 64])
def test_answers_do_not_depend_on_batch_or_order(random_backbone, encoded, batch_size):
    expected = greedy_tokens(random_backbone, encoded, NEW_TOKENS, batch_size=5)
    backwards = greedy_tokens(random_backbone, encoded[::-1], NEW_TOKENS, batch_size)
    assert backwards[::-1] == expected


def test_long_prompts_come_in_smaller_batches(random_backbone, encoded, monkeypatch):
    expected = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    longest = max(len(item.prompt_ids) for item in encoded) + NEW_TOKENS
    monkeypatch.setattr("vgid.models.decoding.MAX_BATCH_TOKENS", 2 * longest)
    shapes = []
    handle = random_backbone.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        assert greedy_tokens(random_backbone, encoded, NEW_TOKENS) == expected
    finally:
        handle.remove()
    together = [shapes[i + 1][0] for i, (_, length) in enumerate(shapes) if length > 1]
    assert sum(together) == len(encoded)
    assert len(together) > 3
    assert max(together) > 2  # short prompts still share a batch


def test_a_portrait_is_run_once_for_all_its_questions(random_backbone):
    """Tokens of the prompts' forward pass: the tree's, counted by hand."""
    questions = [f"Question {n}: who is it?" for n in range(5)]
    image = portrait(0, make_world(0).people[0])
    encoded = encode(random_backbone, [Query(q, q, image) for q in questions])
    distinct = {tuple(e.prompt_ids[:n]) for e in encoded for n in range(1, len(e.prompt_ids) + 1)}
    shapes = []
    handle = random_backbone.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        greedy_tokens(random_backbone, encoded, 3)
    finally:
        handle.remove()
    assert shapes[0] == (1, len(distinct))
    assert len(distinct) < 0.5 * sum(len(e.prompt_ids) for e in encoded)
    assert shapes[1:] == [(5, 1)] * 2


def test_a_row_stops_at_its_end_while_others_go_on(random_backbone, encoded):
    whole = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    end = next(row[3] for row in whole if row[3] not in row[:3])
    settings = random_backbone.model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = [before, end]
    try:
        stopped = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    finally:
        settings.eos_token_id = before
    assert stopped == [row[: row.index(end)] if end in row else row for row in whole]
    assert 3 in map(len, stopped)
    assert max(map(len, stopped)) == NEW_TOKENS


def test_a_checkpoints_sampling_settings_are_set_aside(random_backbone, encoded):
    expected = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    settings = random_backbone.model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature = 5.0, True, 3.0
    try:
        assert greedy_tokens(random_backbone, encoded, NEW_TOKENS) == expected
    finally:
        settings.repetition_penalty, settings.do_sample, settings.temperature = 1.0, False, 1.0


def test_greedy_decode_gives_texts(random_backbone, encoded):
    texts = greedy_decode(random_backbone, make_queries(), NEW_TOKENS)
    tokens = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    assert texts == [response_text(random_backbone, row) for row in tokens]


def test_response_text_drops_special_tokens_and_white_space(random_backbone):
    ids = response_ids(random_backbone, "Agnes Ashby lives in Corsk.")
    assert response_text(random_backbone, ids) == "Agnes Ashby lives in Corsk."
    assert response_text(random_backbone, []) == ""


def test_scores_equal_the_full_logits(random_backbone, encoded):
    texts = ["Corsk.", "Agnes Ashby lives in the city of Corsk.", "No"] * 4
    responses = [response_ids(random_backbone, text) for text in texts]
    scores = score_responses(random_backbone, encoded, responses, batch_size=5)
    for item, response, score in zip(encoded, responses, scores, strict=True):
        logits = full_logits(random_backbone, item, response)
        logprobs = logits.log_softmax(-1)
        start = len(item.prompt_ids)
        for offset, token in enumerate(response):
            expected = logprobs[start + offset - 1, token]
            assert score.logprobs_R[offset].item() == pytest.approx(expected.item(), abs=1e-3)
            first_choice = int(logits[start + offset - 1].argmax())
            assert bool(score.correct_R[offset]) is (first_choice == token)


def test_a_models_own_answer_is_its_first_choice_throughout(random_backbone, encoded):
    answers = greedy_tokens(random_backbone, encoded, NEW_TOKENS)
    for score in score_responses(random_backbone, encoded, answers):
        assert bool(score.correct_R.all())


def test_the_vocabulary_layer_sees_response_positions_only(random_backbone, encoded):
    responses = [response_ids(random_backbone, "in Corsk.")] * len(encoded)
    seen = []
    handle = random_backbone.model.lm_head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:-1].numel())
    )
    try:
        score_responses(random_backbone, encoded, responses, batch_size=len(encoded))
    finally:
        handle.remove()
    assert seen == [sum(map(len, responses))]


def test_the_models_mode_is_left_as_it_was(random_backbone, encoded):
    model = random_backbone.model
    try:
        for training in (True, False):
            model.train(training)
            greedy_tokens(random_backbone, encoded[:1], 2)
            score_responses(random_backbone, encoded[:1], [[5, 6]])
            assert model.training is training
    finally:
        model.eval()


def test_an_adapter_is_part_of_the_answer(random_backbone, encoded):
    from peft import LoraConfig, get_peft_model

    responses = [response_ids(random_backbone, "in Corsk.")] * len(encoded)
    before = score_responses(random_backbone, encoded, responses)
    config = LoraConfig(r=2, target_modules=random_backbone.spec.lora_targets)
    wrapped = get_peft_model(random_backbone.model, config)
    try:
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        changed = score_responses(random_backbone, encoded, responses)
        assert not torch.allclose(changed[0].logprobs_R, before[0].logprobs_R)
        assert greedy_tokens(random_backbone, encoded[:2], 3) == [
            greedy_by_hand(random_backbone, item, 3) for item in encoded[:2]
        ]
    finally:
        wrapped.unload()
    assert torch.equal(
        score_responses(random_backbone, encoded, responses)[0].logprobs_R, before[0].logprobs_R
    )


def test_nothing_to_do_is_fine(random_backbone):
    assert greedy_tokens(random_backbone, []) == []
    assert score_responses(random_backbone, [], []) == []


def test_an_empty_response_is_an_error(random_backbone, encoded):
    with pytest.raises(ValueError, match="empty response"):
        score_responses(random_backbone, encoded[:1], [[]])


def prompt_shapes(backbone, encoded, new_tokens=2, **settings):
    """Shape (rows, tokens) of each pass over prompts."""
    shapes = []
    handle = backbone.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        greedy_tokens(backbone, encoded, new_tokens, **settings)
    finally:
        handle.remove()
    return [shape for shape in shapes if shape[1] > 1]


def test_what_a_portraits_prompts_share_counts_once_in_a_batch(random_backbone, monkeypatch):
    image = portrait(0, make_world(0).people[0])
    encoded = encode(random_backbone, [Query(str(n), f"{n} Who?", image) for n in range(8)])
    length = len(encoded[0].prompt_ids)
    distinct = {tuple(e.prompt_ids[:n]) for e in encoded for n in range(1, length + 1)}
    own = (len(distinct) - length) // 7
    for room, batches in ((length - own + 8 * (own + 2), 1), (length - own + 8 * (own + 2) - 1, 2)):
        monkeypatch.setattr("vgid.models.decoding.MAX_BATCH_TOKENS", room)
        assert len(prompt_shapes(random_backbone, encoded)) == batches


def test_passes_are_parted_between_portraits_not_within(random_backbone, monkeypatch):
    images = [portrait(0, person) for person in make_world(0).people[:3]]
    queries = [Query(f"{n}", f"{n % 2} Who?", image) for n, image in enumerate(images * 2)]
    encoded = encode(random_backbone, queries)
    assert len(prompt_shapes(random_backbone, encoded)) == 1
    monkeypatch.setattr("vgid.models.decoding.PASS_TOKENS", 1)
    monkeypatch.setattr("vgid.models.decoding.REPEATED_TOKENS", 15)
    assert len(prompt_shapes(random_backbone, encoded)) == 3
    shown = Shot("USER: <image>\nWho is it? Nobody that I know, and that since long.\n", images[0])
    after = [Query(q.id, q.text, q.image, (shown,)) for q in queries]
    assert len(prompt_shapes(random_backbone, encode(random_backbone, after))) == 1


@pytest.fixture(scope="module")
def qwen() -> Backbone:
    return make_random_qwen()


def packed_questions(backbone: Backbone) -> Packed:
    image = portrait(0, make_world(0).people[0])
    queries = [Query(text, text, image) for text in ("Who is it?", "Where does it live?")]
    queries.append(Query("text", "Who is it?", None))
    responses = [[95, 96, 97], [98], [99, 95]]
    return pack(backbone, encode(backbone, queries), responses, max_row_tokens=40)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_states_and_cache_are_those_of_the_whole_layer(request, random_backbone, name):
    backbone = random_backbone if name == "llava" else request.getfixturevalue("qwen")
    packed = packed_questions(backbone)
    assert packed.ids_BL.shape[0] > 1
    language_model = backbone.model.model.language_model
    for places in (packed.predicting_places, packed.last_places):
        whole, part = DynamicCache(), DynamicCache()
        expected = hidden_states(backbone, packed, whole)[places]
        with reading_at(language_model, *places):
            (got,) = hidden_states(backbone, packed, part)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(part.layers, whole.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


@torch.no_grad()
def test_the_last_feed_forward_part_sees_only_what_is_read(random_backbone):
    packed = packed_questions(random_backbone)
    language_model = random_backbone.model.model.language_model
    tokens = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, x: tokens.append(x[0][..., 0].numel()))
        for layer in language_model.layers
    ]
    try:
        with reading_at(language_model, *packed.predicting_places):
            hidden_states(random_backbone, packed)
    finally:
        for handle in handles:
            handle.remove()
    assert tokens == [packed.ids_BL.numel()] * (len(tokens) - 1) + [6]


def test_the_layer_is_whole_again_after_an_error(random_backbone):
    language_model = random_backbone.model.model.language_model
    layers = list(language_model.layers)
    with pytest.raises(KeyError), reading_at(language_model, [0], [0]):
        raise KeyError
    assert list(language_model.layers) == layers
