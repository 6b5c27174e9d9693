"""Chained content keys of KV blocks, for a prefix cache local or global.

The key of a block says everything its KV depends on: the model (fingerprint), who may see it
(tenant salt), all tokens before it (its parent's key) and its own tokens. Equal keys therefore mean
equal KV, and a key can be computed by anybody who knows the tokens.
"""

import hashlib
import struct
from collections.abc import Sequence

KEY_BYTES = 16


def root_key(model_fingerprint: str, tenant: str) -> bytes:
    """Parent key of a first block: separates models and tenants from each other."""
    # Keyed by the tenant's digest, so that neither string can run over into the other.
    salt = hashlib.blake2b(tenant.encode(), digest_size=KEY_BYTES, person=b"banyan-tenant").digest()
    return hashlib.blake2b(
        model_fingerprint.encode(), digest_size=KEY_BYTES, key=salt, person=b"banyan-root"
    ).digest()


def block_key(parent: bytes, block_token_ids: Sequence[int]) -> bytes:
    """Key of one full block behind ``parent`` (a block's key or a root); token ids are 32-bit."""
    packed = struct.pack(f"<{len(block_token_ids)}I", *block_token_ids)
    return hashlib.blake2b(
        packed, digest_size=KEY_BYTES, key=parent, person=b"banyan-block"
    ).digest()


def extend_block_keys(
    keys: list[bytes], token_ids: Sequence[int], block_size: int, root: bytes
) -> None:
    """Append to ``keys``, which are right so far, those of the full blocks still missing."""
    for index in range(len(keys), len(token_ids) // block_size):
        parent = keys[-1] if keys else root
        keys.append(block_key(parent, token_ids[index * block_size : (index + 1) * block_size]))


def block_keys(token_ids: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """Keys of all full blocks of ``token_ids``; a partial last block has none."""
    keys: list[bytes] = []
    extend_block_keys(keys, token_ids, block_size, root)
    return keys
