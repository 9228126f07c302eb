"""Learning rates that the operator sets site by site."""

from __future__ import annotations

import asyncio

from tests.server.conftest import House, config, off_loop
from tests.server.houses import answer

RATES = """
[training]
optimizer = { kind = "sgd", learning_rate = 0.5 }
learning_rate_by_site = { a = 0.125, away = 2.0 }
[training.schedule]
kind = "exponential"
factor = 0.5
[aggregation]
kind = "mean"
importance = { a = 2, elsewhere = 3 }
"""


async def test_a_site_is_told_its_own_rate_and_the_report_says_so(house: House) -> None:
    clients = {name: await off_loop(house.client, name) for name in ("a", "b")}
    submitted = await off_loop(house.operator.submit, config(size=2, max_rounds=2, extra=RATES))
    [notice] = [notice for notice in submitted.notices if "no site has enrolled" in notice]
    assert "as away (training.learning_rate_by_site); elsewhere (aggregation.importance)" in notice

    async def work(name: str) -> list[float]:
        return [(await off_loop(answer, clients[name])).plan.optimizer.learning_rate for _ in range(2)]

    told = dict(zip("ab", await asyncio.gather(work("a"), work("b")), strict=True))
    assert told == {"a": [0.125, 0.0625], "b": [0.5, 0.25]}
    await off_loop(house.operator.wait)
    report = await off_loop(house.operator.report)
    for number, round in enumerate(report.rounds):
        assert {c.client_name: c.learning_rate for c in round.clients} == {name: told[name][number] for name in told}


async def test_there_is_no_notice_where_all_sites_are_known(house: House) -> None:
    await off_loop(house.client, "a")
    extra = "[training.learning_rate_by_site]\na = 0.5\n"
    submitted = await off_loop(house.operator.submit, config(size=1, extra=extra))
    assert not [notice for notice in submitted.notices if "enrolled" in notice]
