"""The environment, read in one place. The worker, the API and the command line all take `Settings`."""

import errno
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from gptcore.environment import check_hub_variables, refuse_quotes
from gptcore.rundir import resolve_home


class BadSetting(ValueError):
    """A variable that cannot be used, with its value and what would do."""


HostName = Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?$")]


def host_of(address: str) -> str:
    """Return the host of "name", "name:port" or "[address]:port", in lower case without brackets; "" if it has none."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Settings:
    """Each is TRAINMASTER_ and its name in capitals: TRAINMASTER_GRACE_SECONDS."""

    home: Path  # redis/ runs/ datasets/
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_password_file: str = ""  # holds the password of redis_url, which then has it: no child needs the file
    url: str = "http://127.0.0.1:8000"  # of the server that the command line talks to
    hosts: tuple[HostName, ...] = ()  # names and addresses that a server answers to, besides its URL's
    api_key: str = Field(default="", repr=False)  # that the command line and the client send
    pool: str = "default"
    node: str = Field(default="", pattern=r"^[A-Za-z0-9_-]{0,60}$")  # this one's name; empty: see worker.place
    address: str = ""  # by which other nodes reach this one; empty: as seen on the way to Redis
    slots: str = ""  # "0-3,4-7": ranges of CPU cores or GPUs; empty: one slot with everything
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grace_seconds: float = Field(default=60.0, gt=0)  # from a stop's word to the kill of the whole tree
    hang_seconds: float = Field(default=600.0, gt=0)  # without a step; see Progress.hang
    max_attempts: int = Field(default=3, gt=0)  # lost in a row without a new checkpoint
    # after which an ended job's record moves from Redis to its run directory; 0: never
    retention_days: int = Field(default=0, ge=0)
    price_per_gpu_hour: float = Field(default=0.0, ge=0)  # in whatever currency; 0: none is shown
    hf_namespaces: tuple[str, ...] = ()  # owners on the Hub in whose name jobs may publish
    trainer: str = ""  # program run in torchrun's place with RUN_DIR --attempt N: tests of process handling

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def datasets(self) -> Path:
        return self.home / "datasets"

    @property
    def public_hosts(self) -> frozenset[str]:
        """Names and addresses, other than loopback ones, by which the server is reached."""
        hosts = {host_of(self.url.rpartition("://")[2].partition("/")[0]), *map(host_of, self.hosts)}
        return frozenset(host for host in hosts if host and not is_loopback(host))

    @property
    def public_origin(self) -> str:
        """The Origin that a browser sends for a page under `url`; "" if only this machine reaches it."""
        scheme, _, rest = self.url.lower().partition("://")
        address = rest.partition("/")[0]
        if host_of(address) not in self.public_hosts:
            return ""
        default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
        return f"{scheme}://{address.removesuffix(default_port)}"

    def make_home(self) -> None:
        """Make the home, for its owner alone. Raises BadSetting where that cannot be."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.home, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            why = f"{self.home} cannot be written ({error.strerror})"
            raise BadSetting(f"{why}; set TRAINMASTER_HOME to a folder that this user can write") from error

    def open_to_others(self) -> str:
        """Return a warning where other users of this machine can enter the home, else ""."""
        if not self.home.stat().st_mode & 0o077:
            return ""
        return f"other users of this machine can enter {self.home}; chmod 700 keeps its runs and locks to its owner"

    def refuses_repo(self, repo: str) -> str:
        """Why nothing may be published to owner/name; "" where it may."""
        owner = repo.partition("/")[0]
        if owner in self.hf_namespaces:
            return ""
        listed = ", ".join(self.hf_namespaces) or "nobody"
        return f"repo {repo!r}: jobs may publish as {listed} here; let TRAINMASTER_HF_NAMESPACES list {owner!r}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Raises BadSetting."""
        env = os.environ if environment is None else environment
        known = [_variable(f.name) for f in fields(cls)]
        for name in (name for name in env if name.startswith("TRAINMASTER_") and name not in known):
            # only what is nearly one: compose and Kubernetes have variables of that beginning too
            if near := get_close_matches(name, known, n=1, cutoff=0.93):
                raise BadSetting(f"{name} is not read by anything; use {near[0]}, or unset it")
        try:
            check_hub_variables(env)
            for name in known:
                if name != _variable("trainer"):  # a command line, whose words may be in quotes
                    refuse_quotes(name, env.get(name, ""))
        except ValueError as error:
            raise BadSetting(str(error)) from error
        given: dict[str, Any] = {f.name: text for f in fields(cls) if (text := env.get(_variable(f.name), "").strip())}
        try:
            given["home"] = resolve_home(given.get("home", ""))
        except ValueError as error:
            raise BadSetting(str(error)) from error
        if file := given.get("redis_password_file"):
            given["redis_url"] = _with_password(given.get("redis_url", cls.redis_url), file)
            given["redis_password_file"] = ""
        for name in ("hf_namespaces", "hosts"):
            given[name] = tuple(filter(None, re.split(r"[,\s]+", given.get(name, ""))))
        try:
            return cls(**given)
        except ValidationError as error:
            wrong = error.errors()[0]
            variable, message = _variable(str(wrong["loc"][0])), wrong["msg"][0].lower() + wrong["msg"][1:]
            raise BadSetting(f"{variable} {wrong['input']!r}: {message}") from error

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process read these same settings, but for the API key: none needs it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "api_key"}
        values |= {name: ",".join(values[name]) for name in ("hf_namespaces", "hosts")}
        return {_variable(name): str(value) for name, value in values.items()}


def _with_password(url: str, file: str) -> str:
    """Return a Redis URL with the password in `file`, unless it has one. Raises BadSetting."""
    scheme, _, rest = url.partition("://")
    if "@" in rest:
        return url
    try:
        password = Path(file).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise BadSetting(f"TRAINMASTER_REDIS_PASSWORD_FILE {file!r} cannot be read: {error}") from error
    return f"{scheme}://:{quote(password, safe='')}@{rest}"


def _variable(field: str) -> str:
    return f"TRAINMASTER_{field.upper()}"
