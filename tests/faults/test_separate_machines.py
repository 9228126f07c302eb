"""Coordinator and sites on machines of their own: network namespaces on a bridge, TLS, slow lines, and one that breaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trustme

from fedstream.v1 import runs_pb2
from tests.faults.processes import Coordinator, Federation, Site, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.timeout(200),
    pytest.mark.xdist_group("faults"),
]

MIB = 2**20
COORDINATOR = "10.77.0.1"


class Network:
    """Namespaces on a bridge that lies in the coordinator's, so that this machine's own network is left alone."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:6]
        self._undo = ExitStack()
        self.coordinator = self._namespace("c")
        self._ip("-n", self.coordinator, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.coordinator, "address", "add", f"{COORDINATOR}/24", "dev", "bridge")
        self._ip("-n", self.coordinator, "link", "set", "bridge", "up")

    def close(self) -> None:
        """Takes everything away again."""
        self._undo.close()

    def machine(self, number: int, megabits: int) -> str:
        """A namespace with the address 10.77.0.(1 + number), and its line's rate in both directions."""
        machine, port = self._namespace(str(number)), f"port{number}"
        self._ip("-n", machine, "link", "add", "eth0", "type", "veth", "peer", port, "netns", self.coordinator)
        self._ip("-n", machine, "address", "add", f"10.77.0.{1 + number}/24", "dev", "eth0")
        self._ip("-n", self.coordinator, "link", "set", port, "master", "bridge", "up")
        self._ip("-n", machine, "link", "set", "eth0", "up")
        for namespace, device in ((machine, "eth0"), (self.coordinator, port)):
            limit = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "300ms")
            _call("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)
        return machine

    @contextmanager
    def broken(self, number: int) -> Iterator[None]:
        """Takes the line to a machine down, at the coordinator's end: the machine hears nothing more."""
        self._ip("-n", self.coordinator, "link", "set", f"port{number}", "down")
        try:
            yield
        finally:
            self._ip("-n", self.coordinator, "link", "set", f"port{number}", "up")

    def _namespace(self, suffix: str) -> str:
        name = f"fedstream-{self._name}-{suffix}"
        self._ip("netns", "add", name)
        self._undo.callback(self._ip, "netns", "delete", name)
        self._ip("-n", name, "link", "set", "lo", "up")
        return name

    @staticmethod
    def _ip(*arguments: str) -> None:
        _call("ip", *arguments)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"network namespaces need the command {tool} (iproute2)")
    with ExitStack() as undo:
        try:
            network = Network()
            undo.callback(network.close)
            network.machine(9, megabits=100)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.cmd}: {error.stderr.strip()}")
        yield network


def test_a_line_that_breaks_in_mid_upload_costs_the_time_it_was_down(network: Network, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert(COORDINATOR)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "site.toml").write_text("stall_seconds = 2\n")

    tls = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    coordinator = Coordinator(
        tmp_path / "c", *tls, listen=f"{COORDINATOR}:0", prefix=("ip", "netns", "exec", network.coordinator)
    )
    trust = ("--tls-ca", str(tmp_path / "ca.pem"), "--config", str(tmp_path / "site.toml"))
    near, far = (
        Site(name, tmp_path / name, coordinator, seed, *trust, prefix=("ip", "netns", "exec", machine))
        for seed, (name, machine) in enumerate(
            {"near": network.machine(1, megabits=200), "far": network.machine(2, megabits=32)}.items()
        )
    )
    federation = Federation(coordinator, [near, far])
    try:
        federation.start()
        federation.submit("across", rounds=2, uplink='{ kind = "raw" }')  # long enough to break off
        until(lambda: _uplink(federation, far).wire_bytes > 1.5 * MIB, "the far site has sent a part")
        with network.broken(2):
            until(lambda: _stalls(far), "the far site notices that the line is down")
            assert _uplink(federation, far).wire_bytes < _uplink(federation, near).payload_bytes
        report = federation.finished("across")
    finally:
        federation.stop()

    assert [model.num_updates for model in report.models] == [0, 2, 2]
    assert [event["round"] for event in far.events("trained", run=report.run.run_id)] == [1, 2], "trained once a round"
    resumed = far.events("upload goes on", run=report.run.run_id)
    assert resumed
    assert resumed[0]["offset"] >= MIB
    [uplink] = [client.uplink for client in report.rounds[0].clients if client.client_name == "far"]
    assert uplink.wire_bytes < uplink.payload_bytes + 2 * MIB, "what had arrived was not sent again"


def _uplink(federation: Federation, site: Site) -> runs_pb2.Traffic:
    assignment = federation.assignment("across", site)
    return assignment.uplink if assignment is not None else runs_pb2.Traffic()


def _stalls(site: Site) -> list[str]:
    events = site.events("coordinator not available, trying again")
    return [event["error"] for event in events]
