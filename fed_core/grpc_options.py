"""Channel options that both ends must agree on."""

from __future__ import annotations

# Bulk goes in 1 MiB chunks, so a larger message is a mistake or an attack.
MAX_MESSAGE_BYTES = 8 * 2**20

# NAT tables forget an idle connection after minutes, so an idle one is pinged every 60 s. The server permits pings every 20 s, with
# room for a client whose timer runs early: a server that did not would answer GOAWAY "too_many_pings" and end the transfers on
# the connection. Faster pings would end transfers on links that are down for a moment.
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20
MIN_PING_INTERVAL_SECONDS = 20

Options = list[tuple[str, int | str]]


def _common() -> Options:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options() -> Options:
    """For every channel that a daemon or an operator's tool opens."""
    return [
        *_common(),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 10_000),
    ]


def server_options() -> Options:
    """For the coordinator's server. Without so_reuseport=0 a second server would share the port without a complaint."""
    return [
        *_common(),
        (
            "grpc.http2.min_recv_ping_interval_without_data_ms",
            MIN_PING_INTERVAL_SECONDS * 1000,
        ),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            MIN_PING_INTERVAL_SECONDS * 1000,
        ),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 2**20),
    ]
