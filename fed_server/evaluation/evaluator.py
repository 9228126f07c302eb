"""The coordinator's handle of a process that evaluates models on public data. Free of torch: the coordinator itself never runs a
workload's code."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from fed_core.child_process import CANCELLED, DIED, ChildError, ChildProcess, Json
from fed_core.errors import FedstreamError


class EvaluationError(FedstreamError):
    """The workload's code raised or died, or there is nothing to evaluate on; `traceback` is for the log."""

    reason = "EVALUATION"

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class Evaluator:
    """One workload and its public data, in a process that stays warm; the data is read once in that process's life.

    Thread-safe; evaluations wait for each other. A process that dies is replaced by the next call.
    """

    def __init__(
        self,
        workload_source: str,
        data_path: Path | None,
        log_path: Path | None,
        *,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        """`workload_source` as `load_workload` takes it. What the workload prints goes to `log_path`. `num_threads` decides about
        the last bits of the metrics."""
        self.workload_source = workload_source
        settings = {
            "workload": workload_source,
            "data": str(data_path) if data_path is not None else None,
            "device": device,
            "num_threads": num_threads,
        }
        self._child = ChildProcess("fed_server.evaluation.child", settings, log_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> str:
        """Name of the workload, once its data is known to be readable. Raises EvaluationError."""
        name: str = self._call({"do": "describe"})["name"]
        return name

    def evaluate(self, model_path: Path, batch_size: int) -> tuple[int, dict[str, float]]:
        """Number of examples and mean metrics of a model payload. Blocks. Raises EvaluationError."""
        answer = self._call({"do": "evaluate", "model_path": str(model_path), "batch_size": batch_size})
        return answer["num_examples"], answer["metrics"]

    def close(self) -> None:
        """Ends the process; an evaluation at work raises. Closing twice is harmless."""
        self._child.close()

    def _call(self, request: Json) -> Json:
        try:
            return self._child.call(request)
        except ChildError as error:
            what = f"workload {self.workload_source}"
            if error.kind == CANCELLED:
                raise EvaluationError(f"{what}: the evaluation was broken off, for the coordinator stops") from None
            if error.kind == DIED:
                raise EvaluationError(f"{what}: the evaluation died: {error}", error.traceback) from None
            raise EvaluationError(f"{what}: {error}", error.traceback) from None
