"""Who may ask, and what each may have: API keys, tenants, limits, cache namespaces.

    [[key]]                       # keys.toml
    key = "sk-..."                # or sha256 = "...", the hex digest of the key
    tenant = "search"
    max_running = 8               # requests at a time; more wait
    shares_cache = true           # see what others cached, and be seen; default false
    admin = false                 # may use the routes under /admin

Only digests are kept. A digest is looked up by itself and compared in constant time, so neither the time that
it takes nor a log says anything of a key.
"""

import hashlib
import hmac
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from preble_sgl.errors import InputError
from preble_sgl.server.errors import ApiError

KEYS_VARIABLE = "PREBLE_API_KEYS"
ADMIN_VARIABLE = "PREBLE_ADMIN_KEY"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `namespace`: its part of the caches; empty for the part that those share who may.

    None: there are no tenants to be kept apart.
    """

    name: str = "default"
    max_running: int | None = None
    namespace: str | None = None
    is_admin: bool = False


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(None, min_length=8)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    tenant: str = Field(min_length=1, pattern="^[A-Za-z0-9_.-]+$")
    max_running: int | None = Field(None, ge=1)
    shares_cache: bool = False
    admin: bool = False

    @model_validator(mode="after")
    def _has_one(self) -> "_Key":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give key or sha256")
        return self

    @property
    def digest(self) -> str:
        return self.sha256 if self.key is None else digest(self.key)  # type: ignore[return-value]

    @property
    def of(self) -> Tenant:
        namespace = "" if self.shares_cache else self.tenant
        return Tenant(self.tenant, self.max_running, namespace, self.admin)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: list[_Key] = Field(min_length=1)


class Tenants:
    """The keys that are valid. Without any, everybody is one tenant, and nobody is an admin but by `open`."""

    def __init__(self, keys: Mapping[str, Tenant], *, open_admin: bool = False) -> None:
        self._keys = dict(keys)
        self._anybody = None if keys else Tenant(is_admin=open_admin)

    @classmethod
    def load(cls, file: Path | None) -> "Tenants":
        """Read the keys of a file and of the environment. Raises InputError.

        `PREBLE_API_KEYS`: `tenant:key,tenant:key`. `PREBLE_ADMIN_KEY`: one that may use `/admin`.
        """
        keys = [*_of_file(file), *_of_environment()]
        found = {key.digest: key.of for key in keys}
        if len(found) < len(keys):
            raise InputError("an API key is there twice: give each once")
        # On loopback without keys whoever can connect is the user that could stop the process, too.
        return cls(found, open_admin=not found)

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    def of(self, authorization: str | None) -> Tenant:
        """Return whose key a request carries. Raises ApiError (401)."""
        if self._anybody is not None:
            return self._anybody
        scheme, _, key = (authorization or "").partition(" ")
        given = digest(key.strip())
        for known, tenant in self._keys.items() if scheme.lower() == "bearer" else ():
            if hmac.compare_digest(known, given):
                return tenant
        raise ApiError(HTTPStatus.UNAUTHORIZED, "the API key is missing or unknown", code="invalid_api_key")

    def admin(self, authorization: str | None) -> Tenant:
        """Return the admin whose key a request carries. Raises ApiError (401, 403)."""
        tenant = self.of(authorization)
        if not tenant.is_admin:
            raise ApiError(HTTPStatus.FORBIDDEN, "this route is for admins", code="forbidden")
        return tenant


def digest(key: str) -> str:
    """Return the SHA-256 of a key in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def _of_file(file: Path | None) -> Iterable[_Key]:
    if file is None:
        return ()
    try:
        return _File(**tomllib.loads(file.read_text())).key
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not TOML: {error}") from None
    except ValidationError as error:
        raise InputError(f"{file}: {_first(error)}") from None


def _of_environment() -> Iterable[_Key]:
    try:
        for entry in filter(None, os.environ.get(KEYS_VARIABLE, "").split(",")):
            tenant, _, key = entry.strip().partition(":")
            yield _Key(tenant=tenant, key=key, sha256=None, max_running=None)
        if admin := os.environ.get(ADMIN_VARIABLE):
            yield _Key(tenant="admin", key=admin, sha256=None, max_running=None, admin=True)
    except ValidationError as error:
        raise InputError(f"{KEYS_VARIABLE} or {ADMIN_VARIABLE}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """Return what is wrong first, without the value: it may be a key."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
