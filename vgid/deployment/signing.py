"""Signs what is shipped, and checks signatures: OpenSSF model-signing, key-based, offline.

A signature covers every file of a folder (an export) or one file (a deployment file, which holds
the hash of each file of its adapter). It lies beside what it covers: ``model.sig`` in the folder,
``<file>.sig`` beside the file. It is a Sigstore bundle, so ``model_signing verify key`` checks it
without this package. Keys are elliptic (P-256, P-384 or P-521), as openssl makes them::

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
"""

import base64
import json
from pathlib import Path
from typing import Any

from vgid.errors import InputError
from vgid.files import write_atomically

SIGNATURE = "model.sig"


def signature_of(target: Path) -> Path:
    """Where the signature of a folder or file lies."""
    return target / SIGNATURE if target.is_dir() else target.with_name(f"{target.name}.sig")


def sign(target: Path, private_key: Path) -> Path:
    """Sign a folder or a file; an earlier signature is replaced.

    Args:
        target: an export's folder or a deployment file.
        private_key: elliptic key in PEM, not encrypted.

    Returns:
        The signature's file.

    Raises:
        InputError: no such target, a key that cannot be used, or a link in the folder.
    """
    from model_signing import signing

    signature = _existing(target)
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
    """What is wrong with a signature.

    Args:
        target: the folder or file that was signed.
        public_key: elliptic key in PEM that is trusted.

    Returns:
        None if the key's owner signed exactly the files that are there now; otherwise what differs.

    Raises:
        InputError: no such target, no signature, or a key that cannot be used.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    signature = _existing(target)
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
        return _difference(error, target, signature)
    return None


def _existing(target: Path) -> Path:
    if not target.exists():
        raise InputError(f"{target}: is not there; name an export's folder or a deployment file.")
    return signature_of(target)


def _hashing(*ignored: Path) -> Any:
    """SHA-256 of each file but the signature; git's own files are signed like any other."""
    from model_signing import hashing

    names = [path.name for path in ignored]
    config = hashing.Config().use_file_serialization()
    # The library leaves git's files out by default: whoever adds one to an export would go
    # unnoticed.
    return config.set_ignored_paths(paths=names, ignore_git_paths=False)


def _bad_key(option: str, key: Path, error: Exception) -> InputError:
    return InputError(
        f"{option}: {key} is no readable elliptic key in PEM without a password "
        f"({type(error).__name__}); make one with "
        "`openssl ecparam -name prime256v1 -genkey -noout`."
    )


def _difference(error: Exception, target: Path, signature: Path) -> str:
    message = str(error)
    if message.startswith("Key mismatch"):
        return "the signature is another key's"
    if not message.startswith("Signature mismatch"):
        return f"the signature cannot be read ({type(error).__name__})"
    # The library says that something differs and not what; the list that was signed is in the
    # bundle.
    envelope = json.loads(signature.read_text())["dsseEnvelope"]
    listed = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    signed = {item["name"]: item["digest"] for item in listed}
    manifest = _hashing(signature).hash(target)
    there = {d.identifier: d.digest.digest_hex for d in manifest.resource_descriptors()}
    kinds = {
        "added": there.keys() - signed.keys(),
        "missing": signed.keys() - there.keys(),
        "changed": {name for name in there.keys() & signed.keys() if there[name] != signed[name]},
    }
    return "; ".join(
        f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names
    )
