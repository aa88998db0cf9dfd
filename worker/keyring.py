"""API keys, and who did what with them. A key's text is shown once; only its hash is kept."""

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from worker.connection import Connected
from worker.job import Record
from worker.keys import KEYS

Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # each may do what those before it may
AuditKind = Literal["administration", "requests", "refusals"]
# kind of entry to the name of its stream's key and how many of the newest it keeps
AUDIT: dict[AuditKind, tuple[str, int]] = {
    "administration": ("audit_administration", 10_000), "requests": ("audit", 10_000),
    "refusals": ("audit_refusals", 1_000),
}  # fmt: skip
MARKER = "has-api-keys"  # a file in the home: whoever deletes it opens a local server that has no key

log = logging.getLogger(__name__)


class Key(Record):
    """`sha256` of the secret part: 256 random bits need no slow hash."""

    id: str
    name: str
    scope: Scope
    created_at: datetime
    sha256: str

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class AuditEntry(Record):
    """What was asked of the server beside reading, what it refused, or what was done to its keys."""

    kind: AuditKind
    id: str
    time: datetime
    who: str  # "key ID", "anyone" on a server without keys, "command line", or the address of one without a key
    what: str
    outcome: str
    job_id: str | None = None
    count: int = 1  # refusals: how many requests like this one


class KeyRing(Connected):
    """The keys in the Redis at `url`, and the marker in `home` that says that there was one."""

    def __init__(self, url: str, home: Path):
        super().__init__(url)
        self._marker = home / MARKER

    def create(self, name: str, scope: Scope) -> tuple[Key, str]:
        """A new key and its text, which nobody can ask for again."""
        self._mark()
        key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        key = Key(id=key_id, name=name, scope=scope, created_at=datetime.now(UTC), sha256=_sha256(secret))
        self._redis.hset(KEYS["keys"], key_id, key.model_dump_json())
        self.record("administration", "command line", f"create key {key_id} ({scope})", "created")
        return key, f"tm_{key_id}_{secret}"

    def create_first(self, path: Path) -> None:
        """Where there never was a key, make an admin's and leave it in a file that only its owner reads."""
        if self.is_empty() and not self._redis.exists(KEYS["audit"], KEYS["audit_administration"]):
            path.unlink(missing_ok=True)  # of a key that a Redis now gone knew
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self.create("first", "admin")[1] + "\n")

    def all(self) -> list[Key]:
        """Oldest first."""
        keys = [Key.model_validate_json(text) for text in self._redis.hvals(KEYS["keys"])]
        return sorted(keys, key=lambda key: key.created_at)

    def is_empty(self) -> bool:
        return not self._redis.hlen(KEYS["keys"])

    def are_required(self) -> bool:
        """Return whether a request needs a key: one exists, or one did before Redis lost it.

        A Redis that was flushed, or a home that was copied without it, must not open the server to everyone.
        """
        if self._marker.exists():
            return True
        if self.is_empty():
            return False
        self._mark()
        return True

    def _mark(self) -> None:
        try:
            if not self._marker.exists():
                self._marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._marker.touch(mode=0o600)
        except OSError:  # a full disk; the key itself is in Redis, and the next request tries again
            log.warning("cannot write %s", self._marker, exc_info=True)

    def revoke(self, key_id: str) -> bool:
        """Whether there was such a key."""
        revoked = bool(self._redis.hdel(KEYS["keys"], key_id))
        if revoked:
            self.record("administration", "command line", f"revoke key {key_id}", "revoked")
        return revoked

    def find(self, text: str) -> Key | None:
        """The key with this text. Takes as long for a wrong secret as for a right one."""
        _, _, rest = text.partition("_")
        key_id, _, secret = rest.partition("_")
        record = self._redis.hget(KEYS["keys"], key_id)
        key = Key.model_validate_json(record) if record else None
        fits = hmac.compare_digest(_sha256(secret), key.sha256 if key else _sha256(""))
        if key is None or not fits:
            return None
        self._mark()
        return key

    def record(
        self, kind: AuditKind, who: str, what: str, outcome: str, job_id: str | None = None, count: int = 1
    ) -> None:
        """Add an entry to the audit. Each kind has a stream of its own, so that one cannot push out another."""
        entry = {"time": datetime.now(UTC).isoformat(), "who": who, "what": what, "outcome": outcome, "count": count}
        name, kept = AUDIT[kind]
        self._redis.xadd(KEYS[name], entry | ({"job_id": job_id} if job_id else {}), maxlen=kept, approximate=True)

    def audit(self, kinds: Iterable[AuditKind] = AUDIT, count: int = 100) -> list[AuditEntry]:
        """Return the `count` newest entries of these kinds, newest first."""
        entries = [
            AuditEntry.model_validate({"kind": kind, "id": entry_id, **fields})
            for kind in kinds
            for entry_id, fields in self._redis.xrevrange(KEYS[AUDIT[kind][0]], count=count)
        ]
        return sorted(entries, key=lambda entry: entry.time, reverse=True)[:count]


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
