"""Settings of the daemon: flags, then FED_CLIENT_* in the environment, then the TOML file of --config, then defaults.

The names are the same in all three: `--state-dir`, `FED_CLIENT_STATE_DIR`, `state_dir = `. Lists and tables in the environment are
written `a,b` and `key=value,key=value`; the table of overrides has one variable a field, `FED_CLIENT_OVERRIDES__BATCH_SIZE`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fed_client.logs import LogFormat, LogLevel
from fed_core.errors import ConfigError

ENVIRONMENT_PREFIX = "FED_CLIENT_"
NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,63}")

Device = Literal["auto", "cpu", "cuda", "mps"]
Optimizer = Literal["sgd", "adam", "adamw"]


def split_address(server: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPv6]:PORT. Raises ValueError with the cure."""
    host, separator, port = server.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{server!r} is not an address; write HOST:PORT, such as fed.example.org:8443")
    if "//" in host or ("/" in host):
        raise ValueError(f"{server!r} is a URL; leave the scheme and the path out and write HOST:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether an address never leaves this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(value: str) -> str:
    split_address(value)
    return value


def _text_values(value: Any) -> Any:
    """A table as TOML has it, numbers and booleans as the text that they were written as."""
    if not isinstance(value, Mapping):
        return value
    return {key: str(item).lower() if isinstance(item, bool) else str(item) for key, item in value.items()}


def parse_pairs(pairs: list[str]) -> dict[str, str]:
    """A table out of `key=value` texts. Raises ValueError that names the one that is none."""
    table: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{pair!r} is not key=value")
        table[key.strip()] = value.strip()
    return table


def _labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > 32:
        raise ValueError(f"{len(labels)} labels; at most 32")
    for text in (*labels.keys(), *labels.values()):
        if not _LABEL.fullmatch(text):
            raise ValueError(f"{text!r} is not 1 to 63 characters of [A-Za-z0-9._-]")
    return labels


def default_name() -> str:
    """The host's name, cut to what a site's name may hold."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "site"


def default_state_dir() -> Path:
    """`fed-client` in the user's state folder ($XDG_STATE_HOME, else ~/.local/state)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "fed-client"


class Overrides(BaseModel):
    """What this site sets instead of the plan, where the run's plan allows it; None leaves it to the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int | None = Field(default=None, ge=1, description="Examples per optimizer step")
    learning_rate: float | None = Field(default=None, gt=0, description="Step size of the local optimizer")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the local data; not with steps")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; not with epochs")
    optimizer: Optimizer | None = Field(default=None, description="Local optimizer")

    @model_validator(mode="after")
    def _one_measure_of_work(self) -> Overrides:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are two ways to say the same; give one")
        return self


class Settings(BaseSettings):
    """Everything that the daemon can be told."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )

    server: Annotated[str, AfterValidator(_address)] = Field(description="Address of the coordinator, HOST:PORT")
    state_dir: Path = Field(default_factory=default_state_dir, description="Folder for identity, cache and spool")
    name: str = Field(
        default_factory=default_name, pattern=f"^{NAME_PATTERN}$", description="Name of this site, unique"
    )

    join_token: SecretStr | None = Field(default=None, description="Join token that fed-server printed; needed once")
    join_token_file: Path | None = Field(default=None, description="File that holds the join token")

    tls_ca: Path | None = Field(
        default=None, description="PEM file of the authority that signed the coordinator's certificate"
    )
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate of this site, where the coordinator asks for one"
    )
    tls_key: Path | None = Field(default=None, description="Key of tls_cert")
    tls_server_name: str | None = Field(
        default=None, description="Name in the coordinator's certificate, where it is not the address"
    )
    insecure: bool = Field(
        False, description="No TLS off the loopback either; the identity is still required, and readable on the way"
    )

    workload: list[str] = Field(
        default_factory=list, description="Workloads to offer: an installed name, or path/to/file.py[:Class]"
    )
    data: Path | None = Field(default=None, description="Where this site's data lies; the workload reads it")
    options: Annotated[dict[str, str], BeforeValidator(_text_values)] = Field(
        default_factory=dict, description="Options for the workload"
    )
    labels: Annotated[dict[str, str], BeforeValidator(_text_values), AfterValidator(_labels)] = Field(
        default_factory=dict, description="Labels that runs may select sites by"
    )
    device: Device = Field("auto", description="Where to train; auto takes cuda, then mps, then cpu")
    overrides: Overrides = Overrides()

    require_privacy: bool = Field(
        default=False, description="Take part only in runs that have this site protect its data by itself"
    )
    max_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="Epsilon that this site may spend over all populations in runs where it protects its data by itself, on all of "
        "its data and on single examples each",
    )
    max_delta: float = Field(1e-2, gt=0, lt=1, description="Largest delta at which it does")

    poll_seconds: float = Field(30.0, ge=1, le=60, description="How long a question for work may wait for its answer")
    stall_seconds: float = Field(
        60.0, ge=1, description="A transfer that moves no byte for so long is broken off and resumed"
    )
    cache_models: int = Field(
        2, ge=1, description="Models kept besides those in use; what changed since one of them is all that is fetched"
    )
    carried_runs: int = Field(
        8,
        ge=1,
        description="Runs besides those at work for which is kept what earlier updates left behind for later ones",
    )

    log_format: LogFormat = Field("auto", description="pretty, json, or auto: pretty on a terminal")
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.join_token is not None and self.join_token_file is not None:
            raise ValueError("join_token and join_token_file say the same; give one")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        if self.insecure and (self.tls_ca or self.tls_cert or self.tls_server_name):
            raise ValueError("insecure drops TLS, and tls_* asks for it; take one of them out")
        for field in ("tls_ca", "tls_cert", "tls_key"):
            path: Path | None = getattr(self, field)
            if path is not None and not os.access(path, os.R_OK):
                raise ValueError(f"{field}: {path} cannot be read; give a PEM file that this user may read")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        return split_address(self.server)

    @property
    def uses_tls(self) -> bool:
        """TLS everywhere but on the loopback, where it is used only if a certificate setting asks for it, and with `insecure`."""
        asked = bool(self.tls_ca or self.tls_cert or self.tls_server_name)
        return not self.insecure and (asked or not is_loopback(self.address[0]))

    def read_join_token(self) -> str | None:
        """The join token, from wherever it was given; None where it was not. Raises ConfigError for a file without one."""
        if self.join_token is not None:
            return self.join_token.get_secret_value().strip()
        if self.join_token_file is None:
            return None
        try:
            token = self.join_token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"join_token_file: {self.join_token_file} cannot be read: {error}") from error
        if not token:
            raise ConfigError(
                f"join_token_file: {self.join_token_file} is empty; put the token in it that fed-server printed"
            )
        return token


class _Environment(EnvSettingsSource):
    """FED_CLIENT_* with lists as `a,b` and tables as `key=value,key=value`: JSON in an environment file is no joy to quote."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if field_name == "workload":
            return parts
        if field_name in ("options", "labels"):
            return parse_pairs(parts)
        return super().decode_complex_value(field_name, field, value)


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Settings from all sources. `flags` holds what the command line gave and nothing else. Raises ConfigError whose text
    lists every problem: the field, what was expected, the cure."""
    _refuse_unknown_variables()
    if config is not None:
        _refuse_bad_toml(config)

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = (init_settings, _Environment(settings_cls))
            return sources if config is None else (*sources, TomlConfigSettingsSource(settings_cls, toml_file=config))

    try:
        return Sourced(**flags)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error
    except SettingsError as error:  # from _Environment.decode_complex_value
        raise ConfigError(f"environment: {error.__cause__} ({error})") from error


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        flag = "--" + path.replace("_", "-")
        variable = ENVIRONMENT_PREFIX + path.upper()
        return f"{path}: missing; give {flag}, set {variable}, or write it in the --config file"
    if problem["type"] == "extra_forbidden":
        known = list(Overrides.model_fields if path.startswith("overrides.") else Settings.model_fields)
        return f"{path}: no such setting{_did_you_mean(path.rpartition('.')[2], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {problem['input']!r}"


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _refuse_bad_toml(config: Path) -> None:
    try:
        with config.open("rb") as file:
            tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config: {config} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config: {config} is not TOML: {error}") from error


def _refuse_unknown_variables() -> None:
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields} | {ENVIRONMENT_PREFIX + "CONFIG"}
    known |= {f"{ENVIRONMENT_PREFIX}OVERRIDES__{name.upper()}" for name in Overrides.model_fields}
    unknown = [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known]
    if unknown:
        raise ConfigError("\n".join(f"{name}: no such setting{_did_you_mean(name, sorted(known))}" for name in unknown))
