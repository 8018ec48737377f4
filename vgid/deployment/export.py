"""Exports a deployment to a folder that is served without this package.

::

    OUT/adapter/             PEFT adapter; its config names the base by hub id and revision
    OUT/merged/              base and adapter in one, as the base has it: safetensors, processor
    OUT/README.md            model card
    OUT/chat_template.jinja  the prompt frame, for servers
    OUT/deployment.yaml      the deployment file, byte for byte
    OUT/SHA256SUMS           the hash of each of these files (``vgid.deployment.manifest``)
"""

import os
import shutil
from pathlib import Path

from vgid.config import Config
from vgid.deployment.card import model_card
from vgid.deployment.manifest import write_manifest
from vgid.deployment.merging import merge
from vgid.deployment.record import Deployment, hash_files, read_deployment
from vgid.deployment.vllm import CHAT_TEMPLATE, chat_template_of, serve_adapter, serve_merged
from vgid.errors import InputError
from vgid.models.adapter_files import copy_adapter, read_adapter
from vgid.models.backbones import locate, revision_of, skeleton, spec

DEPLOYMENT, ADAPTER, MERGED = "deployment.yaml", "adapter", "merged"


class Exported(Config):
    """What was written.

    Attributes:
        output: the folder.
        serve: command that serves the merged model with vLLM, to be run in that folder.
        compare: the same with the adapter, for comparison only; None where vLLM takes no adapter
            of its rank.
    """

    output: Path
    serve: str
    compare: str | None


def export(file: Path, output: Path, model_path: str | None = None) -> Exported:
    """Export a deployment; the folder appears whole or not at all.

    Args:
        file: deployment file.
        output: new or empty folder.
        model_path: folder or hub id of the base, where it is not what the file says.

    Raises:
        InputError: the file or its adapter was changed, the base is not there or another one, the
            adapter lacks a weight or holds one outside the language model, or the output cannot be
            written.
    """
    output = output.expanduser().absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output}: is there already; name a new folder to export to.")
    deployment, _ = read_deployment(file)
    folder = deployment.adapter_folder(file)
    if hash_files(folder) != deployment.adapter.files:
        raise InputError(f"{folder}: is not the adapter of {file}; see `vgid verify {file}`.")
    adapter = read_adapter(folder)
    base = find_base(deployment, model_path)
    adapter.check(skeleton(base), spec(deployment.backbone).lora_targets)
    # Beside its place, so that the last step is a rename on one disk.
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        copy_adapter(folder, temporary / ADAPTER, deployment.base.hub_id, deployment.base.revision)
        merge(base, adapter, temporary / MERGED)
        shutil.copyfile(file, temporary / DEPLOYMENT)
        (temporary / "README.md").write_text(model_card(deployment), encoding="utf-8")
        template = chat_template_of(deployment.frame, base)
        (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        write_manifest(temporary)
        temporary.replace(output)
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); free some space or name another "
            "folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(
        output=output, serve=serve_merged(deployment), compare=serve_adapter(deployment)
    )


def find_base(deployment: Deployment, model_path: str | None = None) -> Path:
    """The folder of the very base that a deployment was made from.

    Args:
        deployment: names the base and its revision.
        model_path: folder or hub id of it, where it is not what the deployment says.

    Raises:
        InputError: it is not there, or is another one.
    """
    folder = locate(spec(deployment.backbone), model_path or deployment.base.model_path)
    found, wanted = revision_of(folder), deployment.base.revision
    if found != wanted:
        raise InputError(
            f"{folder}: is at revision {found[:12]} and the deployment's base at {wanted[:12]}; "
            "name that base with --model-path."
        )
    return folder
