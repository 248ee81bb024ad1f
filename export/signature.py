"""Who made an artifact: an Ed25519 signature over its manifest, which holds every file's hash.

Hashes say that a file is the one exported; a signature says by whom. AOTInductor packages hold
native code, so verify before serving what somebody else exported.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from export.manifest import MANIFEST_FILE, SIGNATURE_FILE, ArtifactError

MAKING_KEYS = (
    "openssl genpkey -algorithm ed25519 -out KEY; openssl pkey -in KEY -pubout -out KEY.pub"
)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """An unencrypted PEM private key. Raises ArtifactError where it is not one of Ed25519."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise _not_a_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _not_a_key(path, "private")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """A PEM public key. Raises ArtifactError where it is not one of Ed25519."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _not_a_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _not_a_key(path, "public")
    return key


def sign(directory: Path, key: Ed25519PrivateKey) -> None:
    """Writes the signature of the directory's manifest beside it."""
    content = (directory / MANIFEST_FILE).read_bytes()
    (directory / SIGNATURE_FILE).write_bytes(key.sign(content))


def check_signature(directory: Path, content: bytes, key: Ed25519PublicKey) -> None:
    """Raises ArtifactError unless `content`, read as the directory's manifest, was signed with
    `key`'s private half."""
    try:
        signature = (directory / SIGNATURE_FILE).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{directory}: is not signed ({error.strerror})") from error
    try:
        key.verify(signature, content)
    except InvalidSignature as error:
        raise ArtifactError(
            f"{directory}: its manifest was not signed by the trusted key, or was changed since"
        ) from error


def _not_a_key(path: Path, kind: str) -> ArtifactError:
    return ArtifactError(f"{path}: is not a PEM Ed25519 {kind} key; make a pair: {MAKING_KEYS}")
