"""The trainer process, `python -m fed_client.training.child`: started by `fed_client.training.trainer`, never by hand."""

from __future__ import annotations

import os

from fed_core.child_process import Channel


def main() -> None:
    """Serves jobs until the daemon closes the pipe."""
    channel = Channel.open()
    # cuBLAS reads it once, when the device is first used; without it its sums depend on the order of streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # After the pipes are safe: importing torch may print.
    from fed_client.training.jobs import SiteJobs, kind_of

    channel.serve(SiteJobs(channel.settings()).answer, kind_of)


if __name__ == "__main__":
    main()
