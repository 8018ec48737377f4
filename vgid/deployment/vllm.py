"""How an export is served by vLLM: the exact commands, and the chat template of the prompt frame.

What is deployed is the merged model. A server of the base with the adapter beside it keeps the base
itself under a name, and takes it for every request that names no model.

Servers bind to the loopback; who wants more puts something with authentication before them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vgid.deployment.record import Deployment, Frame
from vgid.prompts import Form, generation_text

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be: ``MaxLoRARanks`` in vLLM's ``vllm/config/lora.py``."""

CHAT_TEMPLATE = "chat_template.jinja"

COMPARISON_ONLY = (
    "For comparison only, never to deploy: the server lists the base as well, and whoever names "
    "the base, or names no model, gets the base's answers, nothing suppressed."
)
"""Stands before every command that serves the adapter."""


def max_lora_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` that holds an adapter; None above all that vLLM knows."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def serve_merged(deployment: Deployment) -> str:
    """The command to deploy with: serves the merged weights, from the export's folder."""
    return _command("./merged", deployment, [f"--served-model-name {served_name(deployment)}"])


def serve_adapter(deployment: Deployment) -> str | None:
    """The command that serves the base with the adapter, see ``COMPARISON_ONLY``.

    Returns:
        None where the adapter's rank is larger than vLLM takes.
    """
    limit = max_lora_rank(deployment.adapter.rank)
    if limit is None:
        return None
    base, flags = deployment.base, []
    if base.hub_id is None:
        source = "BASE"
    else:
        source = base.hub_id
        flags.append(f"--revision {base.revision}")
    flags += [
        "--enable-lora",
        f"--lora-modules {served_name(deployment)}=./adapter",
        f"--max-lora-rank {limit}",
    ]
    return _command(source, deployment, flags)


def served_name(deployment: Deployment) -> str:
    """What clients call the model."""
    return f"{deployment.backbone}-{deployment.origin.trial_id}"


def chat_template(frame: Frame, bos: str, image_tokens: Sequence[str]) -> str:
    """The turns that open questions were measured in, as a Jinja template.

    Where the benchmark asks in another turn than models are taught in, a question is asked in its
    turn by the answer instructions that end it (``prompts.generation_text``). One user message with
    at most one image is taken and nothing else, for nothing else was measured. Base models' own
    templates may put another white space somewhere, and so ask another question than the one that
    was trained and measured.

    The loops over ``messages`` and ``message.content`` are what vLLM looks for to hand a message on
    in its parts; otherwise it joins them to one text with line breaks of its own.

    Args:
        frame: the prompt frame.
        bos: text of the token that the tokenizer puts in front; empty if there is none.
        image_tokens: what a text must not contain.
    """

    def turn(framed: str) -> str:
        before, after = framed.split("{text}")
        return f"{{{{ {json.dumps(bos + before)} + user.text + {json.dumps(after)} }}}}"

    def refuse(sentence: str) -> str:
        return f"{{{{ raise_exception({json.dumps(sentence)}) }}}}"

    def open_question(form: Form) -> str:
        taught = frame.image if form == "image" else frame.text
        measured = frame.asked.get(f"generation/{form}", taught)
        if measured == taught:
            return turn(taught)
        ends = f"user.text.endswith({json.dumps(generation_text('', form))})"
        return f"{{%- if {ends} -%}}{turn(measured)}{{%- else -%}}{turn(taught)}{{%- endif -%}}"

    one_turn = refuse("One user message and no system message, as in training and measurement.")
    return (
        "{%- set user = namespace(text='', images=0, turns=0) -%}\n"
        "{%- for message in messages -%}\n"
        "{%- set user.turns = user.turns + 1 -%}\n"
        f"{{%- if message.role != 'user' -%}}{one_turn}{{%- endif -%}}\n"
        "{%- if message.content is string -%}{%- set user.text = message.content -%}\n"
        "{%- else -%}\n"
        "{%- for part in message.content -%}\n"
        "{%- if part.type == 'text' -%}{%- set user.text = user.text + part.text -%}\n"
        "{%- elif part.type == 'image' -%}{%- set user.images = user.images + 1 -%}\n"
        f"{{%- else -%}}{refuse('Text and one image at most.')}{{%- endif -%}}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if user.turns != 1 -%}}{one_turn}{{%- endif -%}}\n"
        f"{{%- if user.images > 1 -%}}{refuse('One image at most.')}{{%- endif -%}}\n"
        f"{{%- for token in {json.dumps(list(image_tokens))} -%}}\n"
        "{%- if token in user.text -%}"
        f"{refuse('The text holds an image token; send the image as a part of its own.')}"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if user.images -%}}{open_question('image')}"
        f"{{%- else -%}}{open_question('text')}{{%- endif -%}}\n"
    )


def chat_template_of(frame: Frame, base: Path) -> str:
    """The chat template with the tokens that a base's own files name."""
    from transformers import AutoConfig, AutoTokenizer

    offline = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(base, **offline)
    # A server takes the template's text as it is and adds no such token of its own.
    first = tokenizer.decode(tokenizer("")["input_ids"][:1])
    settings = AutoConfig.from_pretrained(base, **offline).to_dict()
    ids = [settings[name] for name in sorted(settings) if _names_image_token(name)]
    return chat_template(frame, first, tokenizer.convert_ids_to_tokens(ids))


def _names_image_token(setting: str) -> bool:
    """Whether a config's setting is the id of a token that stands for images or around them."""
    kind = setting.startswith(("image_", "video_", "vision_"))
    return kind and setting.endswith(("_token_id", "_token_index"))


def _command(model: str, deployment: Deployment, flags: list[str]) -> str:
    """The flags behind the template make requests without their own settings decode as measured."""
    from vgid.models.decoding import MAX_NEW_TOKENS

    # As measured: sampled, or given more room, the same weights may say more than the record
    # promises.
    decoding = json.dumps({"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS})
    parts = [
        f"vllm serve {model}",
        f"--dtype {deployment.base.precision}",
        *flags,
        f"--chat-template ./{CHAT_TEMPLATE}",
        "--chat-template-content-format openai",
        "--generation-config vllm",
        f"--override-generation-config '{decoding}'",
        f"--limit-mm-per-prompt '{json.dumps({'image': 1})}'",
        "--host 127.0.0.1",
    ]
    return " \\\n  ".join(parts)
