"""Who calls: clients by their secret, operators by the Unix socket or their token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from fed_core.errors import PermissionDeniedError, UnauthenticatedError
from fed_server.store.base import ClientRecord

# Set by the interceptor for the call at hand.
_client_id: ContextVar[str] = ContextVar("client_id")

SECRET_BYTES = 32


def new_secret() -> str:
    """A secret of 256 random bits, URL-safe."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hash_secret(secret: str) -> str:
    """What is stored of a secret. It has 256 random bits, so a plain SHA-256 cannot be searched and needs no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()


def caller() -> str:
    """Client id of the call at hand. Only in Participation and Transfer, where the interceptor has set it."""
    return _client_id.get()


@dataclass(frozen=True)
class Authenticator:
    """Decides whether a call may go on."""

    find_client: Callable[[str], ClientRecord | None]
    operator_token_hash: str

    def check(self, service: str, method: str, metadata: Mapping[str, str], peer: str) -> None:
        """Sets `caller()` for client services. Raises UnauthenticatedError or PermissionDeniedError with the cure."""
        scheme, _, credential = metadata.get("authorization", "").partition(" ")
        if service in ("fedstream.v1.Participation", "fedstream.v1.Transfer"):
            if method == "Enroll":
                return
            _client_id.set(self._client(scheme, credential))
        elif service == "fedstream.v1.Runs":
            self._operator(scheme, credential, peer)

    def _client(self, scheme: str, credential: str) -> str:
        client_id, _, secret = credential.partition(".")
        client = self.find_client(client_id) if scheme == "Bearer" and secret else None
        if client is None or not hmac.compare_digest(client.secret_hash, hash_secret(secret)):
            raise UnauthenticatedError(
                "unknown client or wrong secret; a site enrols with the join token that fed-server prints (fed-client enroll)"
            )
        return client.client_id

    def _operator(self, scheme: str, credential: str, peer: str) -> None:
        if peer.startswith("unix:"):
            return  # whoever may open the socket (0600 in a 0700 directory) is the operator
        if not credential:
            raise UnauthenticatedError("operators need the operator token over TCP: fedctl --operator-token-file FILE")
        if scheme == "Bearer" and hmac.compare_digest(self.operator_token_hash, hash_secret(credential)):
            return
        client_id = credential.partition(".")[0]
        if self.find_client(client_id) is not None:
            raise PermissionDeniedError("a client's credentials do not open the operator's service")
        raise UnauthenticatedError(
            "this is not the operator token; it is in the file operator-token of the data directory"
        )
