"""Sites that take turns."""

from __future__ import annotations

from pathlib import Path

from fedstream.v1 import participation_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import answer, back_in, open_house, until


async def test_the_report_says_how_often_each_site_was_asked_and_how_often_it_counted(house: House) -> None:
    clients = {name: await off_loop(house.client, name) for name in ("a", "b", "c")}
    text = config(size=2, max_rounds=3).replace("[cohort]\n", '[cohort]\nselection = "round_robin"\nmin_clients = 3\n')
    for client in clients.values():
        await off_loop(client.poll, wait_seconds=0)
    await off_loop(house.operator.submit, text)
    asked: dict[str, list[int]] = {name: [] for name in clients}
    counted = dict.fromkeys(clients, 0)
    for number in (1, 2, 3):
        await until(lambda number=number: house.operator.run().round == number)
        if number == 1:
            request = runs_pb2.GetRunRequest(run="test")
            sites = (await off_loop(house.operator.call, "GetRun", request)).sites
            assert [site.client_name for site in sites] == ["a", "b", "c"]
            assert sorted(site.num_selected for site in sites) == [0, 1, 1]
        for name, client in clients.items():
            for work in (await off_loop(client.poll, wait_seconds=0)).assignments:
                asked[name].append(number)
                if name == "b":
                    kind = participation_pb2.FAILURE_KIND_WORKLOAD
                    await off_loop(client.report_failure, work.assignment_id, kind=kind, message="no")
                else:
                    await off_loop(answer, client, 0.25, 1, work)
                    counted[name] += 1
    await off_loop(house.operator.wait)
    report = await off_loop(house.operator.report)
    assert {s.client_name: (s.num_selected, s.num_counted, s.last_round) for s in report.sites} == {
        name: (len(rounds), counted[name], rounds[-1]) for name, rounds in asked.items()
    }
    assert [len(rounds) for rounds in asked.values()] == [2, 2, 2]


async def test_in_turn_goes_on_after_a_restart_where_it_was(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    secrets: dict[str, str] = {}
    asked: list[set[str]] = []

    async def play(house: House, rounds: range) -> None:
        clients = {name: await off_loop(back_in, house, secrets[name]) for name in names}
        for number in rounds:
            for client in clients.values():
                await off_loop(client.poll, wait_seconds=0)
            await until(lambda number=number: house.operator.run().round == number)
            cohort = set()
            for name, client in clients.items():
                work = (await off_loop(client.poll, wait_seconds=0)).assignments
                if work:
                    cohort.add(name)
                    await off_loop(answer, client, 0.25, 1, work[0])
            asked.append(cohort)
        for client in clients.values():
            client.close()

    text = config(size=2, max_rounds=4).replace("[cohort]\n", '[cohort]\nselection = "round_robin"\nmin_clients = 4\n')
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, text)
        for name in names:
            client = await off_loop(house.client, name)
            secrets[name] = dict(client._metadata)["authorization"].removeprefix("Bearer ")
            client.close()
        await play(house, range(1, 2))
        await until(lambda: house.operator.report().models[-1].version == 1)
    async with open_house(tmp_path / "data") as house:
        await play(house, range(2, 5))
        await off_loop(house.operator.wait)
    assert asked[0] | asked[1] == asked[2] | asked[3] == set(names)
    assert all(len(cohort) == 2 for cohort in asked)
