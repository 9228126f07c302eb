"""The floors: what the same bytes cost without a federation around them.

(a) grpc.aio streams of raw 1 MiB frames both ways, each upload added in place. (b) the same, and each upload written to a file,
hashed with BLAKE3, fsynced, and folded exactly. No store, no checks, no manifest, no new model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch
from blake3 import blake3

from fed_core.grpc_options import client_options, server_options
from fed_server.aggregation.exact import ExactSum

FRAME = 2**20


class Floor:
    """Serves a model of zeros; a round ends when every client's upload is in."""

    def __init__(self, num_parameters: int, num_clients: int, kind: str, folder: str) -> None:
        self._model = bytes(4 * num_parameters)
        self._num_clients = num_clients
        self._kind = kind
        self._folder = folder
        self._accumulator = torch.zeros(num_parameters if kind == "a" else 0)
        self._exact = ExactSum(num_parameters if kind == "b" else 0, -40)
        self._pool = ThreadPoolExecutor(8)
        self._arrived = 0
        self.round_over = asyncio.Event()
        self._began = 0.0
        self.seconds: list[float] = []

    def begin(self) -> None:
        """Starts the clock of the first round."""
        self._began = time.perf_counter()

    def handler(self) -> grpc.GenericRpcHandler:
        """Down and up."""
        return grpc.method_handlers_generic_handler(
            "Floor",
            {
                "Down": grpc.unary_stream_rpc_method_handler(self.down),
                "Up": grpc.stream_unary_rpc_method_handler(self.up),
            },
        )

    async def down(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """The model in frames."""
        for start in range(0, len(self._model), FRAME):
            yield self._model[start : start + FRAME]

    async def up(self, frames: AsyncIterator[bytes], context: Any) -> bytes:
        """One update."""
        if self._kind == "a":
            first = 0
            async for frame in frames:
                values = torch.frombuffer(frame, dtype=torch.float32)
                self._accumulator[first : first + len(values)].add_(values, alpha=1.0)
                first += len(values)
        else:
            await self._durable(frames)
        self._arrived += 1
        over = self.round_over
        if self._arrived == self._num_clients:
            now = time.perf_counter()
            self.seconds.append(now - self._began)
            self._began, self._arrived, self.round_over = now, 0, asyncio.Event()
            over.set()
        else:
            await over.wait()
        return b""

    async def _durable(self, frames: AsyncIterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        handle, path = tempfile.mkstemp(dir=self._folder)
        hasher = blake3()
        offset = 0

        def take(frame: bytes, at: int) -> None:
            os.pwrite(handle, frame, at)
            hasher.update(frame)
            self._exact.add(at // 4, torch.frombuffer(frame, dtype=torch.float32), 1)

        async for frame in frames:
            await loop.run_in_executor(self._pool, take, frame, offset)
            offset += len(frame)
        await loop.run_in_executor(self._pool, os.fsync, handle)
        os.close(handle)
        os.unlink(path)


async def serve(arguments: argparse.Namespace) -> None:
    """Prints the address, then one line per round."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        floor = Floor(arguments.parameters, arguments.clients, arguments.kind, folder)
        server = grpc.aio.server(options=server_options())
        server.add_generic_rpc_handlers((floor.handler(),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        await server.start()
        floor.begin()
        while len(floor.seconds) < arguments.rounds:
            await floor.round_over.wait()
        print(" ".join(f"{s:.6f}" for s in floor.seconds), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await server.stop(0.1)


def floor_client(address: str, num_parameters: int, rounds: int) -> None:
    """One client of the floor."""
    data = memoryview(bytes(4 * num_parameters))
    frames = [bytes(data[start : start + FRAME]) for start in range(0, len(data), FRAME)]
    with grpc.insecure_channel(address, client_options()) as channel:
        down = channel.unary_stream("/Floor/Down")
        up = channel.stream_unary("/Floor/Up")
        for _ in range(rounds):
            for _frame in down(b"", wait_for_ready=True):
                pass
            up(iter(frames))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["a", "b"])
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--folder", default=None)
    asyncio.run(serve(parser.parse_args()))
