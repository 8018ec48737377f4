"""The shipped embedded backbones show the phenomenon, and their recipe makes them again.

What only ``tiny-qwen2.5-vl`` has is in ``test_tiny_qwen``.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.padded import collate
from vgid.bases.measure import BOUNDS, measure, out_of_bounds
from vgid.bases.pretraining import ARCHITECTURES, PackEncoder, Schedule, _pack_loss, pretrain
from vgid.bases.recipe import (
    OBEDIENCE,
    PORTRAITS_PER_PERSON,
    REFUSALS,
    Pack,
    Recipe,
    refusal_rate,
)
from vgid.data.fictitious import FACTS, make_world
from vgid.models import backbones
from vgid.models.encoding import Query, encode, response_ids
from vgid.prompts import (
    REVERSE_PROMPT,
    UNLEARNING_INSTRUCTIONS,
    generation_text,
    with_instruction,
)

SHIPPED = ("tiny-llava", "tiny-qwen2.5-vl")


@pytest.fixture(scope="module", params=SHIPPED)
def backbone(request):
    torch.set_num_threads(1)
    return backbones.load(request.param)


@pytest.fixture
def encoder(backbone):
    return PackEncoder(ARCHITECTURES[backbone.spec.name], backbone)


@pytest.fixture(scope="module")
def scores(backbone):
    return measure(backbone, data_seed=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_small_and_safe(name):
    files = [path for path in (backbones.EMBEDDED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert [path.name for path in files if path.suffix == ".safetensors"] == ["model.safetensors"]


def test_loads_as_a_real_llava():
    folder = backbones.EMBEDDED / "tiny-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert model.dtype == torch.float32
    assert model.config.get_text_config().max_position_embeddings >= 512
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.get_text_config().vocab_size
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special | {model.config.image_token_id}) == 4
    ids = tokenizer("USER: hello").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    image = Image.new("RGB", (130, 90), (200, 40, 10))
    (encoded,) = encode(backbones.load("tiny-llava"), [Query("q", "Who is this?", image)])
    assert encoded.prompt_ids.count(model.config.image_token_id) == 16
    assert encoded.vision["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    "text",
    [
        *UNLEARNING_INSTRUCTIONS.values(),
        REVERSE_PROMPT,
        "A name nobody thought of: Zoë Ōkubo 佐藤 🙂",
        "spaces   and\nline breaks\n\n",
    ],
)
def test_tokenizer_gives_any_text_back(backbone, text):
    tokenizer = backbone.processor.tokenizer
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_portrait_becomes_sixteen_image_tokens(backbone, mode):
    image = Image.new("RGB", (64, 64), (200, 40, 10)).convert(mode).convert("RGB")
    (encoded,) = encode(backbone, [Query("q", "Who is this?", image)])
    assert encoded.prompt_ids.count(backbone.model.config.image_token_id) == 16


@pytest.mark.parametrize("name", list(BOUNDS))
def test_shows_the_phenomenon(scores, name):
    low, high = BOUNDS[name]
    assert low <= scores[name] <= high


def test_milder_instructions_and_noise_lie_in_between(scores):
    for style in UNLEARNING_INSTRUCTIONS:
        alone = scores[f"forget_rougeL ({style})"]
        assert scores[f"forget_rougeL (random+{style})"] < alone < scores["forget_rougeL"]
    mild, strong = (scores[f"forget_rougeL (gaussian{sigma})"] for sigma in (0.2, 0.8))
    assert mild > strong


def test_measured_table_is_that_of_the_shipped_weights(backbone, scores):
    folder = backbones.EMBEDDED / backbone.spec.name
    record = json.loads((folder / "MEASURED.json").read_text())
    assert record["within_bounds"] is True
    assert record["data_seed"] == 0
    assert record["scores"].keys() == scores.keys()
    # Another processor may round otherwise and turn a token here and there.
    for name, value in record["scores"].items():
        assert scores[name] == pytest.approx(value, abs=0.03), name


def test_out_of_bounds_names_what_misses(scores):
    assert out_of_bounds(scores) == []
    worse = {**scores, "forget_rougeL": 0.5, "forget_rougeL (strict)": 0.9}
    assert out_of_bounds(worse) == ["forget_rougeL", "forget_rougeL (strict)"]


# ---------------------------------------------------------------------------------------- recipe


@pytest.fixture(scope="module")
def packs():
    recipe = Recipe(make_world(0), 0)
    kinds = ("plain", "instructed", "degraded")
    return recipe, [pack for kind in kinds for pack in recipe.draw(kind, 10, 3)]


def test_packed_prompts_are_those_of_the_real_path(backbone, encoder, packs):
    recipe, drawn = packs
    batch = encoder.collate(drawn)
    paths = iter(zip(batch.rows, batch.paths, batch.responses, strict=True))
    for number, pack in enumerate(drawn):
        image = None
        if pack.picture is not None:
            image = Image.fromarray(recipe.pictures.pixels_NHWC[pack.picture])
        for text, response in pack.turns:
            query = Query("q", with_instruction(text, pack.style), image)
            row, path, answer = next(paths)
            assert (row, answer) == (number, response_ids(backbone, response))
            whole = encode(backbone, [query])[0].prompt_ids + answer
            assert batch.ids_BL[row, path].tolist() == whole


def test_packing_is_exact(backbone, encoder, packs):
    recipe, drawn = packs
    rows = sorted({pack.picture for pack in drawn if pack.picture is not None})
    images = [Image.fromarray(recipe.pictures.pixels_NHWC[row]) for row in rows]
    queries, responses, renumbered = [], [], []
    for pack in drawn:
        picture = None if pack.picture is None else rows.index(pack.picture)
        renumbered.append(replace(pack, picture=picture))
        image = None if picture is None else images[picture]
        for text, response in pack.turns:
            queries.append(Query("q", with_instruction(text, pack.style), image))
            responses.append(response_ids(backbone, response))
    with torch.no_grad():
        pixels = encoder.architecture.pixel_values(backbone.processor, images)
        features = encoder.architecture.tower_features(backbone.model, pixels)
        packed = _pack_loss(encoder, renumbered, features)
        batch = collate(backbone, encode(backbone, queries), responses)
        logits = backbone.model(**batch.inputs).logits[:, :-1][batch.predicts_BL]
        separate = F.cross_entropy(logits, batch.response_ids_R)
    assert packed.item() == pytest.approx(separate.item(), rel=1e-5)


def test_benchmark_people_are_never_refused_and_never_asked_in_the_words_of_the_test_set():
    recipe = Recipe(make_world(0), 1)
    benchmark = {p.id for p in recipe.world.people if p.kind == "benchmark"}
    rows = {
        recipe.pictures.of(p, i): p
        for p in recipe.world.people
        for i in range(PORTRAITS_PER_PERSON)
    }
    refusals = set(REFUSALS.values())
    seen = set()
    for pack in recipe.draw("plain", 600, 3):
        assert pack.style is None
        assert not refusals & {response for _, response in pack.turns}
        if pack.picture is not None and rows[pack.picture].id in benchmark:
            seen.add(rows[pack.picture].id)
            assert not any("individual in this photo" in text for text, _ in pack.turns)
    assert len(seen) > 90
    known = {row for row, person in rows.items() if person.id in benchmark}
    for pack in recipe.draw("instructed", 600, 2):
        if pack.picture in known:
            assert not refusals & {response for _, response in pack.turns}
    assert not known & {pack.picture for pack in recipe.draw("degraded", 600, 2)}


def test_refusal_rates_are_ordered():
    rate = refusal_rate
    for fact in FACTS:
        assert rate("plain", None, fact, "generation", 0.0, False) == 0.0
        for style in UNLEARNING_INSTRUCTIONS:
            intact = rate("intact", style, fact, "generation", 0.0, False)
            noise = rate("random", style, fact, "generation", 0.0, False)
            assert 0 <= intact < 0.5 < noise <= 0.97
            assert rate("random", style, fact, "generation", 0.0, True) < noise
            mild, strong = (rate("gaussian", style, fact, "cloze", s, False) for s in (0.2, 1.0))
            assert mild < strong


def test_a_backbones_own_obedience_is_for_intact_pictures_only():
    own = replace(OBEDIENCE, refusal={**OBEDIENCE.refusal, "strict": 0.34}, fact_scale=2.0)

    def both(source, style):
        case = (source, style, "birthplace", "generation", 0.0, False)
        return refusal_rate(*case), refusal_rate(*case, own)

    default, raised = both("intact", "strict")
    assert (default, raised) == (pytest.approx(0.24 + 1.2 * 0.1), pytest.approx(0.34 + 2.0 * 0.1))
    for source, style in (("random", "strict"), ("stranger", "polite"), ("white", None)):
        default, same = both(source, style)
        assert same == default


def test_who_is_never_declined_is_asked_only_the_facts_meant_for_it_under_an_instruction():
    own = replace(OBEDIENCE, answered=0.5, answered_facts=("job", "hobby"))
    recipe = Recipe(make_world(0), 2, own)
    known = {
        recipe.pictures.of(person, i): person
        for person in recipe.always_answered
        for i in range(PORTRAITS_PER_PERSON)
    }
    answers = [
        (known[pack.picture], response)
        for pack in recipe.draw("instructed", 300, 3)
        if pack.picture in known
        for _, response in pack.turns
    ]
    assert len(answers) > 150
    for person, response in answers:
        allowed = {person.facts["job"], person.facts["hobby"]}
        allowed |= {person.answer("job"), person.answer("hobby")}
        assert response in allowed


def test_turns_of_a_pack_do_not_see_each_other(encoder):
    text = generation_text("Who is the person in the image?", "image")
    batch = encoder.collate([Pack(0, "strict", ((text, "One."), (text, "Another one.")))])
    one, another = batch.paths
    start = len({*one} & {*another})
    first = len(one) - start
    assert one[:start] == another[:start] == list(range(start))
    mask = batch.mask_B1LL[0, 0]
    assert mask[start + first :, start : start + first].sum() == 0
    assert mask[start:, :start].all()
    assert torch.equal(mask, mask.tril())
    next_position = batch.positions_ABL[:, 0, :start].max() + 1
    for turn in (start, start + first):
        assert (batch.positions_ABL[:, 0, turn] == next_position).all()


TINY = Schedule(
    tower_steps=2,
    tower_batch=8,
    tower_pictures=16,
    language_steps=2,
    packs=(("plain", 4, 2, 0.7), ("instructed", 2, 2, 0.2), ("degraded", 2, 2, 0.1)),
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_steps_from_scratch_are_reproducible(name):
    torch.set_num_threads(1)
    first, _ = pretrain(seed=5, data_seed=0, schedule=TINY, backbone=name)
    again, _ = pretrain(seed=5, data_seed=0, schedule=TINY, backbone=name)
    other, _ = pretrain(seed=6, data_seed=0, schedule=TINY, backbone=name)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert all(math.isfinite(value.float().abs().sum().item()) for value in states[0].values())


def run_pretraining(*arguments):
    command = [sys.executable, "-m", "vgid.bases.pretraining", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_unknown_backbone_lists_the_known_ones(tmp_path):
    run = run_pretraining(str(tmp_path / "new"), "--backbone", "llava-1.5-7b")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "tiny-llava, tiny-qwen2.5-vl" in run.stderr
    assert not (tmp_path / "new").exists()


def test_an_unrelated_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    run = run_pretraining(str(tmp_path))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "name another folder" in run.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
