"""The chat template asks what was measured, in a form that vLLM hands images on to; no vLLM needed.

``make test-serving`` runs one.
"""

from typing import Any

import jinja2
import pytest
from jinja2 import nodes
from PIL import Image
from transformers.utils.chat_template_utils import _compile_jinja_template

from vgid.deployment.export import chat_template, chat_template_of
from vgid.deployment.record import Frame
from vgid.models.backbones import BACKBONES, EMBEDDED, load, spec
from vgid.models.encoding import Query, encode
from vgid.prompts import generation_text

TOKENS = ("<image>", "<|image_pad|>")
QUESTION = 'Who is "this"? {{ messages }} \n {% raw %} Zoë'


def frame_of(name: str) -> Frame:
    return Frame(**spec(name).frame.recorded)


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    text: str = _compile_jinja_template(template).render(messages=messages)
    return text


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


IMAGE = {"type": "image"}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_message_becomes_the_turn_of_an_open_question(name):
    frame, row = frame_of(name), spec(name).frame
    template = chat_template(frame, "<s>", TOKENS)
    with_image = row.turn("image").replace("{text}", QUESTION)
    without = row.turn("text").replace("{text}", QUESTION)
    for parts in ((IMAGE, QUESTION), (QUESTION, IMAGE), (QUESTION[:3], IMAGE, QUESTION[3:])):
        assert rendered(template, user(*parts)) == f"<s>{with_image}"
    plain = [{"role": "user", "content": QUESTION}]
    assert rendered(template, user(QUESTION)) == rendered(template, plain) == f"<s>{without}"


def test_the_evaluations_wording_is_asked_in_the_benchmarks_turn():
    template = chat_template(frame_of("llava-1.5-7b"), "", TOKENS)
    image, text = (generation_text("Who is this?", form) for form in ("image", "text"))
    assert rendered(template, user(IMAGE, image)) == f"USER: <image>\n{image}\nASSISTANT: "
    assert rendered(template, user(text)) == f"USER: {text}\nASSISTANT:"
    for other in ("Who is this?", f"{image} Go.", text):
        assert rendered(template, user(IMAGE, other)) == f"USER: <image>\n{other}\nASSISTANT:"


@pytest.mark.parametrize("name", BACKBONES)
def test_what_was_not_measured_is_refused(name):
    template = chat_template(frame_of(name), "", TOKENS)
    one = user(IMAGE, QUESTION)
    for messages, sentence in (
        ([], "One user message"),
        ([{"role": "system", "content": "Be kind."}, *one], "no system message"),
        ([{"role": "system", "content": "Be kind."}], "no system message"),
        ([*one, {"role": "assistant", "content": "Ann."}, *one], "One user message"),
        ([*one, *one], "One user message"),
        (user(IMAGE, IMAGE, QUESTION), "One image at most"),
        (user({"type": "video"}, QUESTION), "Text and one image at most"),
        (user({"type": "audio"}, QUESTION), "Text and one image at most"),
        (user("Who is <image>?"), "image token"),
        (user(IMAGE, "Who is <|image", "_pad|>?"), "image token"),
        ([{"role": "user", "content": "Who is <image>?"}], "image token"),
    ):
        with pytest.raises(jinja2.TemplateError, match=sentence):
            rendered(template, messages)


@pytest.mark.parametrize("name", BACKBONES)
def test_vllm_sees_a_template_of_parts(name):
    """As its ``_detect_content_format`` looks: a loop over messages, in it one over the content."""
    tree = jinja2.Environment().parse(chat_template(frame_of(name), "", TOKENS))
    loops = list(tree.find_all(nodes.For))
    over_messages = [
        loop.target.name
        for loop in loops
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    ]
    over_content = [
        loop
        for loop in loops
        if isinstance(loop.iter, nodes.Getattr)
        and loop.iter.attr == "content"
        and isinstance(loop.iter.node, nodes.Name)
        and loop.iter.node.name in over_messages
    ]
    assert len(over_messages) == len(over_content) == 1


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_the_prompt_is_that_of_the_platform_and_its_tokens_are_the_bases(name):
    backbone = load(name, device="cpu")
    template = chat_template_of(frame_of(name), EMBEDDED / name)
    text = generation_text("Who is this?", "image")
    image = Image.new("RGB", (64, 64), (200, 40, 10))
    for picture, parts in ((image, (IMAGE, text)), (None, (text,))):
        (ours,) = encode(backbone, [Query("q", text, picture)])
        inputs = backbone.processor(
            text=rendered(template, user(*parts)), images=picture, add_special_tokens=False
        )
        assert list(inputs["input_ids"][0]) == ours.prompt_ids
    tokens = {"tiny-llava": ["<image>"], "tiny-qwen2.5-vl": ["<|image_pad|>", "<|video_pad|>"]}
    around = ["<|vision_start|>", "<|vision_end|>"] if "qwen" in name else []
    for token in (*tokens[name], *around):
        with pytest.raises(jinja2.TemplateError, match="image token"):
            rendered(template, user(IMAGE, f"Who is {token}?"))
