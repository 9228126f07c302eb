"""The evaluating process, `python -m fed_server.evaluation.child`: started by `fed_server.evaluation.evaluator`, never by hand."""

from __future__ import annotations

import os

from fed_core.child_process import Channel


def main() -> None:
    """Serves evaluations until the coordinator closes the pipe."""
    channel = Channel.open()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # After the pipes are safe: importing torch may print.
    from fed_server.evaluation.jobs import EvaluationJobs

    channel.serve(EvaluationJobs(channel.settings()).answer, lambda error: "WORKLOAD")


if __name__ == "__main__":
    main()
