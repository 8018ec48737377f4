"""Signatures over folders and files, with keys and a second opinion by openssl."""

import base64
import json
import random
import subprocess
from pathlib import Path

import pytest

from vgid.deployment.signing import SIGNATURE, sign, signature_fault
from vgid.errors import InputError


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, made as the documentation says."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(make, check=True)
    show = ["openssl", "ec", "-in", private, "-pubout", "-out", public]
    subprocess.run(show, check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / "adapter").mkdir(parents=True)
    (made / "README.md").write_text("card")
    (made / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8)
    return made


def test_a_signed_folder_is_verified_wherever_it_lies(folder, keys):
    assert sign(folder, keys[0]) == folder / SIGNATURE
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter", SIGNATURE]
    assert signature_fault(folder, keys[1]) is None
    moved = folder.rename(folder.with_name("elsewhere"))
    assert signature_fault(moved, keys[1]) is None


def test_openssl_finds_the_same_signature_good(folder, keys, tmp_path):
    sign(folder, keys[0])
    envelope = json.loads((folder / SIGNATURE).read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    (tmp_path / "signed").write_bytes(
        b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    )
    (tmp_path / "raw").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", keys[1], "-signature", tmp_path / "raw"]
    subprocess.run([*command, tmp_path / "signed"], check=True, capture_output=True)
    named = {item["name"] for item in json.loads(payload)["predicate"]["resources"]}
    assert named == {"README.md", "adapter/adapter_model.safetensors"}


def test_a_changed_added_or_missing_file_is_named(folder, keys):
    sign(folder, keys[0])
    weights = folder / "adapter" / "adapter_model.safetensors"
    content, draw = weights.read_bytes(), random.Random(0)
    for place in draw.sample(range(len(content)), 20):
        changed = bytes([content[place] ^ draw.randrange(1, 256)])
        weights.write_bytes(content[:place] + changed + content[place + 1 :])
        assert signature_fault(folder, keys[1]) == "changed: adapter/adapter_model.safetensors"
    weights.write_bytes(content)
    for name in (".gitignore", "adapter/extra.py"):
        (folder / name).write_text("")
        assert signature_fault(folder, keys[1]) == f"added: {name}"
        (folder / name).unlink()
    (folder / "README.md").unlink()
    assert signature_fault(folder, keys[1]) == "missing: README.md"


def test_another_key_or_a_changed_signature_is_refused(folder, keys, tmp_path):
    sign(folder, keys[0])
    _, theirs = make_keys(tmp_path, "theirs")
    assert signature_fault(folder, theirs) == "the signature is another key's"
    content = (folder / SIGNATURE).read_bytes()
    start = content.index(b'"dsseEnvelope"') + 40
    for place in range(start, start + 200, 10):
        other = b"A" if content[place : place + 1] != b"A" else b"B"
        (folder / SIGNATURE).write_bytes(content[:place] + other + content[place + 1 :])
        assert signature_fault(folder, keys[1]) is not None
    (folder / SIGNATURE).write_bytes(content[:100])
    assert "cannot be read" in str(signature_fault(folder, keys[1]))


def test_a_file_is_signed_beside_itself(folder, keys):
    card = folder / "README.md"
    assert sign(card, keys[0]) == folder / "README.md.sig"
    assert signature_fault(card, keys[1]) is None
    card.write_text("cart")
    assert "changed" in str(signature_fault(card, keys[1]))


def test_bad_input_is_one_sentence(folder, keys, tmp_path):
    with pytest.raises(InputError, match=r"model\.sig: is missing"):
        signature_fault(folder, keys[1])
    with pytest.raises(InputError, match=r"--private-key: .* is no readable elliptic key"):
        sign(folder, tmp_path / "no.pem")
    rsa = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    with pytest.raises(InputError, match="--private-key"):
        sign(folder, rsa)
    sign(folder, keys[0])
    with pytest.raises(InputError, match="--public-key"):
        signature_fault(folder, keys[0])
    with pytest.raises(InputError, match="is not there"):
        sign(tmp_path / "nothing", keys[0])
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="plain files only"):
        sign(folder, keys[0])
