"""How an export is served by vLLM: the exact commands, and the chat template of the prompt frame.

Servers bind to the loopback; who wants more puts something with authentication before them.
"""

import json

from vgid.deployment import Deployment, Frame

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be: ``MaxLoRARanks`` in vLLM's ``vllm/config/lora.py``."""

CHAT_TEMPLATE = "chat_template.jinja"


def max_lora_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` that holds an adapter; None above all that vLLM knows."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def serve_merged(deployment: Deployment) -> str:
    """The command that serves the merged weights, from the export's folder."""
    return _command("./merged", deployment, [f"--served-model-name {served_name(deployment)}"])


def serve_adapter(deployment: Deployment) -> str | None:
    """The command that serves the base with the adapter; None where its rank is too large."""
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


def chat_template(frame: Frame, bos: str) -> str:
    """The prompt frame as a Jinja template for one user message, with or without an image.

    Base models' own templates may put another white space somewhere, and so ask another question
    than the one that was trained and measured.

    Args:
        frame: the prompt frame.
        bos: text of the token that the tokenizer puts in front; empty if there is none.
    """

    def turn(framed: str) -> str:
        before, after = framed.split("{text}")
        return f"{{{{ {json.dumps(bos + before)} + user.text + {json.dumps(after)} }}}}"

    return (
        "{%- set user = namespace(text='', images=0) -%}\n"
        "{%- if messages | length != 1 or messages[0].role != 'user' -%}\n"
        "{{ raise_exception('One user message, as in training and measurement.') }}\n"
        "{%- elif messages[0].content is string -%}\n"
        "{%- set user.text = messages[0].content -%}\n"
        "{%- else -%}\n"
        "{%- for part in messages[0].content -%}\n"
        "{%- if part.type == 'text' -%}{%- set user.text = user.text + part.text -%}\n"
        "{%- else -%}{%- set user.images = user.images + 1 -%}{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{%- if user.images > 1 -%}{{ raise_exception('One image at most.') }}{%- endif -%}\n"
        f"{{%- if user.images -%}}{turn(frame.image)}{{%- else -%}}{turn(frame.text)}"
        "{%- endif -%}\n"
    )


def _command(model: str, deployment: Deployment, flags: list[str]) -> str:
    parts = [
        f"vllm serve {model}",
        f"--dtype {deployment.base.precision}",
        *flags,
        f"--chat-template ./{CHAT_TEMPLATE}",
        "--host 127.0.0.1",
    ]
    return " \\\n  ".join(parts)
