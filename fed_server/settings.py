"""Settings of the coordinator's process: flags, then FED_SERVER_* in the environment, then a TOML file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from fed_core.errors import ConfigError

DEFAULT_DATA_DIR = Path("fedstream-data")


class ServerSettings(BaseSettings):
    """What one fed-server needs to know; what a run needs is in its run config."""

    model_config = SettingsConfigDict(env_prefix="FED_SERVER_", extra="forbid", frozen=True)

    data_dir: Path = Field(
        default=DEFAULT_DATA_DIR, description="Directory for state, models and the operator's socket."
    )
    listen: str = Field(default="127.0.0.1:8443", description="HOST:PORT for clients; port 0 picks a free one.")
    tls_cert: Path | None = Field(default=None, description="Certificate chain of this server, PEM.")
    tls_key: Path | None = Field(default=None, description="Private key of that certificate, PEM.")
    tls_ca: Path | None = Field(default=None, description="CA whose client certificates are required, PEM; optional.")
    insecure: bool = Field(
        default=False, description="Listen without TLS off the loopback. Never drops authentication."
    )
    workloads: tuple[str, ...] = Field(
        default=(), description="Workloads to evaluate with on this machine: entry point names or FILE.py[:Class]."
    )
    evaluation_data: Path | None = Field(default=None, description="Public evaluation data for those workloads.")
    max_concurrent_transfers: int = Field(default=8, ge=1, le=1024, description="Bulk streams at once; others wait.")
    lease_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="Silence after which a client counts as gone."
    )
    drain_seconds: float = Field(
        default=10.0, ge=0, le=3600, description="On SIGTERM, how long transfers that are under way may go on."
    )
    metrics_listen: str | None = Field(
        default=None,
        description="HOST:PORT where Prometheus finds /metrics, without credentials; port 0 picks a free one.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe lines logged."
    )
    log_format: Literal["auto", "json", "pretty"] = Field(
        default="auto", description="auto: pretty on a terminal, JSON lines elsewhere."
    )

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host, separator, port = value.rpartition(":")
        if not separator or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT such as 0.0.0.0:8443 or [::]:8443, got {value!r}")
        return value

    @model_validator(mode="after")
    def _is_safe(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or neither")
        if self.tls_ca is not None and self.tls_cert is None:
            raise ValueError("tls_ca asks clients for certificates over TLS; give tls_cert and tls_key too")
        if not self.is_loopback and self.tls_cert is None and not self.insecure:
            raise ValueError(
                f"listening on {self.listen} without TLS would show secrets and models to the network; give --tls-cert and "
                f"--tls-key, or --insecure where something else encrypts (a VPN, a proxy)"
            )
        return self

    @property
    def host(self) -> str:
        """Host part of `listen`, brackets removed."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(config_file: Path | None, **flags: object) -> ServerSettings:
    """Settings from flags (None: not given), environment and file. Raises ConfigError naming the setting and the cure."""
    if config_file is not None and not config_file.is_file():
        raise ConfigError(f"--config {config_file}: there is no such file")

    class Sources(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file)

    try:
        given: Any = {name: value for name, value in flags.items() if value is not None and value != ()}
        return Sources(**given)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"]))
            flag = f"--{name.replace('_', '-')}: " if name else ""
            problems.append(f"{flag}{detail['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(problems)) from None
