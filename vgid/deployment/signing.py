"""Signs what is shipped, and checks signatures: OpenSSF model-signing, key-based, offline.

A signature covers every file of a folder (an export) or one file (a deployment file, which holds
the hash of each file of its adapter). It is a Sigstore bundle beside what it covers, ``model.sig``
in the folder or ``<file>.sig``, so ``model_signing verify key`` checks it without this package.
Keys are elliptic: P-256, P-384 or P-521.

An export also has a manifest in coreutils' format, ``SHA256SUMS``: what each of its files must be,
and that there is no other. Whoever can change a file can change it too: the signature covers both.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgid.deployment.record import hash_files
from vgid.errors import InputError
from vgid.files import write_atomically

SIGNATURE, MANIFEST = "model.sig", "SHA256SUMS"

_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>.+)")


def sign(target: Path, private_key: Path) -> Path:
    """Sign an export's folder or a deployment file with a PEM's key that is not encrypted.

    Returned is the signature's file, in place of an earlier one; InputError for no such target, a
    key that cannot be used, or a link in the folder.
    """
    from model_signing import signing

    signature = _signature_of(target)
    temporary = signature.with_name(f".{signature.name}.tmp")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _bad_key("--private-key", private_key, error) from None
    try:
        config.set_hashing_config(_hashing(signature, temporary)).sign(target, temporary)
        write_atomically(signature, temporary.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{target}: cannot be signed ({type(error).__name__}); it must hold plain files only, "
            "in a folder that can be written."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return signature


def signature_fault(target: Path, public_key: Path) -> str | None:
    """What is wrong with a signature; None if the key's owner signed exactly what is there now.

    InputError for no such target, no signature, or a key that cannot be used.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    signature = _signature_of(target)
    if not signature.is_file():
        raise InputError(f"{signature}: is missing; sign with `vgid sign {target}`.")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _bad_key("--public-key", public_key, error) from None
    try:
        config.set_hashing_config(_hashing(signature)).verify(target, signature)
    except InvalidSignature:
        return "the signature is not this key's, or was changed"
    except Exception as error:  # a damaged bundle fails in JSON, base64, protobuf or in-toto
        message = str(error)
        if message.startswith("Key mismatch"):
            return "the signature is another key's"
        if not message.startswith("Signature mismatch"):
            return f"the signature cannot be read ({type(error).__name__})"
        # The library tells digests byte by byte; the list that was signed is in the bundle.
        envelope = json.loads(signature.read_text())["dsseEnvelope"]
        listed = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        signed = {item["name"]: item["digest"] for item in listed}
        manifest = _hashing(signature).hash(target)
        there = {d.identifier: d.digest.digest_hex for d in manifest.resource_descriptors()}
        return differences(signed, there)
    return None


def _signature_of(target: Path) -> Path:
    if not target.exists():
        raise InputError(f"{target}: is not there; name an export's folder or a deployment file.")
    return target / SIGNATURE if target.is_dir() else target.with_name(f"{target.name}.sig")


def _hashing(*ignored: Path) -> Any:
    """SHA-256 of each file but the signature; git's own files are signed like any other."""
    from model_signing import hashing

    names = [path.name for path in ignored]
    config = hashing.Config().use_file_serialization()
    # The library leaves git's files out by default: one that is added would go unnoticed.
    return config.set_ignored_paths(paths=names, ignore_git_paths=False)


def _bad_key(option: str, key: Path, error: Exception) -> InputError:
    return InputError(
        f"{option}: {key} is no readable elliptic key in PEM without a password "
        f"({type(error).__name__}); make one with "
        "`openssl ecparam -name prime256v1 -genkey -noout`."
    )


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below a folder into it."""
    lines = (f"{sha256}  {name}\n" for name, sha256 in _listed(folder).items())
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def manifest_fault(folder: Path) -> str | None:
    """How a folder differs from its manifest, if it does; a link always: it may change later."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read; export again"
    matches = [_LINE.fullmatch(line) for line in lines]
    recorded = {match["name"]: match["sha256"] for match in matches if match}
    if len(recorded) != len(lines) or not lines:
        return f"{MANIFEST} is damaged; export again"
    return differences(recorded, _listed(folder)) or None


def _listed(folder: Path) -> dict[str, str]:
    """What a manifest lists: all but itself and the signature, a link as what is no file."""
    return {
        name: "" if (folder / name).is_symlink() else sha256
        for name, sha256 in hash_files(folder).items()
        if name not in (MANIFEST, SIGNATURE)
    }


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What differs between two lists of hashes by name, in words; empty if nothing does."""
    kinds = {
        "missing": recorded.keys() - found.keys(),
        "added": found.keys() - recorded.keys(),
        "changed": {n for n in found.keys() & recorded.keys() if found[n] != recorded[n]},
    }
    told = (f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)
    return "; ".join(told)
