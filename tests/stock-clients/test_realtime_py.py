"""Unmodified Python `realtime` (wire version 1): it hears what it may hear, exactly, and nothing else.

Needs a running Walcast in its environment; `make -C tests python` gives it one.
"""

import asyncio
import itertools
import json
import os
import unittest

import psycopg
from realtime import AsyncRealtimeClient, RealtimePostgresChangesListenEvent

WITHIN_S = 20
NUMBER = itertools.count(1)

COLUMNS = [
    {"name": "id", "type": "int8"},
    {"name": "patient_id", "type": "int8"},
    {"name": "prescribed_by", "type": "int8"},
    {"name": "name", "type": "text"},
    {"name": "dose", "type": "numeric"},
    {"name": "unit", "type": "text"},
    {"name": "taken_at", "type": "_text"},
    {"name": "instructions", "type": "jsonb"},
    {"name": "active", "type": "bool"},
    {"name": "started_on", "type": "date"},
    {"name": "prescribed_at", "type": "timestamptz"},
]


def need(name: str) -> str:
    """A missing setting is an error with its remedy, never a skipped test."""
    if name not in os.environ:
        raise RuntimeError(f"{name} is not set; run these tests with: make -C tests python")
    return os.environ[name]


def unique(what: str) -> str:
    return f"{what} py{os.getpid()}-{next(NUMBER)}"


class Inbox:
    """Keeps what was heard and waits for what shall be; a deadline says what did come."""

    def __init__(self) -> None:
        self.heard: list = []
        self._news = asyncio.Event()

    def put(self, *item) -> None:
        self.heard.append(item[0] if len(item) == 1 else item)
        self._news.set()

    async def find(self, fits, what: str):
        try:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    self._news.clear()
                    for item in self.heard:
                        if fits(item):
                            return item
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"did not hear {what} within {WITHIN_S} s; heard: {self.heard}") from None


def name_of(change) -> str | None:
    data = change["data"]
    return (data.get("record") or data.get("old_record") or {}).get("name")


def about(name: str, kind: str):
    return lambda change: name_of(change) == name and change["data"]["type"] == kind


class StockPythonClient(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.token = need("WALCAST_TOKEN")
        self.db = await psycopg.AsyncConnection.connect(need("WALCAST_DATABASE_URL_ADMIN"), autocommit=True)
        self.addAsyncCleanup(self.db.close)
        self.client = AsyncRealtimeClient(f"{need('WALCAST_URL')}/realtime/v1", token=self.token)
        await self.client.connect()
        self.addAsyncCleanup(self.client.close)
        self.mine, self.also_mine, self.not_mine = await self.patients()

    async def patients(self) -> tuple[int, int, int]:
        rows = await (await self.db.execute(
            """select p.id, exists (select from assignments a join providers d on d.id = a.provider_id
                                    where a.patient_id = p.id and a.ended_at is null and d.user_id = %s)
               from patients p order by p.id""",
            [subject_of(self.token)],
        )).fetchall()
        ours = [id for id, is_ours in rows if is_ours]
        others = [id for id, is_ours in rows if not is_ours]
        return ours[0], ours[1], others[0]

    async def prescribe(self, patient: int, name: str) -> int:
        row = await (await self.db.execute(
            """insert into medications (patient_id, name, dose, unit, taken_at, instructions, active, started_on, prescribed_at)
               values (%s, %s, 12.50, 'mg', '{08:00,20:00}', '{"with_food": true, "max_per_day": 2}', true, '2026-01-02',
                       '2026-01-02T03:04:05.678901Z') returning id""",
            [patient, name],
        )).fetchone()
        return row[0]

    async def listen(self, filter: str | None = None):
        changes, states = Inbox(), Inbox()
        channel = self.client.channel(unique("room"))
        channel.on_postgres_changes(
            RealtimePostgresChangesListenEvent.All, table="medications", schema="public", filter=filter, callback=changes.put
        )
        await channel.subscribe(lambda status, error: states.put(status, error))
        await states.find(lambda state: state[0] == "SUBSCRIBED", "SUBSCRIBED")
        return channel, changes, states

    def assert_change(self, change, kind: str, record, old_record) -> None:
        data = dict(change["data"])
        self.assertRegex(data.pop("commit_timestamp"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        expected = {"schema": "public", "table": "medications", "type": kind, "columns": COLUMNS, "errors": None}
        if record is not None:
            expected["record"] = record
        if old_record is not None:
            expected["old_record"] = old_record
        self.assertEqual(data, expected)
        self.assertEqual(len(change["ids"]), 1)

    async def test_insert_update_and_delete_arrive_with_their_exact_shapes(self) -> None:
        _, changes, _ = await self.listen()
        name = unique("exact")
        id = await self.prescribe(self.mine, name)
        row = {
            "id": id, "patient_id": self.mine, "prescribed_by": None, "name": name, "dose": 12.5, "unit": "mg",
            "taken_at": ["08:00", "20:00"], "instructions": {"with_food": True, "max_per_day": 2}, "active": True,
            "started_on": "2026-01-02", "prescribed_at": "2026-01-02T03:04:05.678901+00:00",
        }  # fmt: skip
        self.assert_change(await changes.find(about(name, "INSERT"), "the insert"), "INSERT", row, None)

        await self.db.execute("update medications set dose = 0.25, active = false where id = %s", [id])
        changed = row | {"dose": 0.25, "active": False}
        self.assert_change(await changes.find(about(name, "UPDATE"), "the update"), "UPDATE", changed, row)

        await self.db.execute("delete from medications where id = %s", [id])
        self.assert_change(await changes.find(about(name, "DELETE"), "the delete"), "DELETE", None, changed)

    async def test_an_eq_filter_lets_through_its_own_rows_only(self) -> None:
        _, changes, _ = await self.listen(filter=f"patient_id=eq.{self.also_mine}")
        outside, inside = unique("outside"), unique("inside")
        await self.prescribe(self.mine, outside)
        await self.prescribe(self.also_mine, inside)
        # Changes come in commit order, so once the later one is here, the earlier one is not coming.
        await changes.find(about(inside, "INSERT"), "the row inside the filter")
        self.assertEqual([change for change in changes.heard if name_of(change) == outside], [])

    async def test_each_filter_lets_through_exactly_the_rows_that_it_means(self) -> None:
        low, high = unique("low"), unique("High, x")
        cases = {
            f"patient_id=eq.{self.mine}": [low],
            f"patient_id=neq.{self.mine}": [high],
            f"patient_id=in.({self.mine},999999)": [low],
            f"patient_id=not.in.({self.mine},999999)": [high],
            "name=like.low %": [low],
            "name=not.like.low %": [high],
            "name=ilike.HIGH%": [high],
            "name=match.^low": [low],
            "name=imatch.^HIGH": [high],
            "dose=gte.12.5": [low, high],
            "dose=lt.12.5": [],
            "active=is.true": [low, high],
            "active=not.is.true": [],
            "prescribed_by=is.null": [low, high],
            "prescribed_by=isdistinct.1": [low, high],
            f'name=eq."{high}"': [high],
            f"dose=gt.1,patient_id=eq.{self.mine}": [low],
        }
        listening = {filter: (await self.listen(filter=filter))[1] for filter in cases}
        _, witness, _ = await self.listen()
        last = unique("last")
        await self.prescribe(self.mine, low)
        await self.prescribe(self.also_mine, high)
        await self.prescribe(self.mine, last)
        # On one socket, in commit order: nothing comes after the last row of who joined last.
        await witness.find(about(last, "INSERT"), "the last row")
        for filter, expected in cases.items():
            heard = [name_of(change) for change in listening[filter].heard]
            self.assertEqual([name for name in heard if name in (low, high)], expected, filter)

    async def test_another_providers_patient_is_never_heard(self) -> None:
        _, changes, _ = await self.listen()
        foreign, own = unique("foreign"), unique("own")
        id = await self.prescribe(self.not_mine, foreign)
        await self.db.execute("update medications set dose = 2 where id = %s", [id])
        await self.db.execute("delete from medications where id = %s", [id])
        await self.prescribe(self.mine, own)
        await changes.find(about(own, "INSERT"), "the own row")
        self.assertEqual([change for change in changes.heard if foreign in json.dumps(change, default=str)], [])
        old_ids = [change["data"].get("old_record", {}).get("id") for change in changes.heard]
        self.assertNotIn(id, old_ids)

    async def test_after_unsubscribe_nothing_more_is_heard(self) -> None:
        gone, gone_changes, gone_states = await self.listen()
        _, stays, _ = await self.listen()
        earlier, later = unique("earlier"), unique("later")
        await self.prescribe(self.mine, earlier)
        await gone_changes.find(about(earlier, "INSERT"), "a row before unsubscribe")

        await gone.unsubscribe()
        await gone_states.find(lambda state: state[0] == "CLOSED", "CLOSED")
        await self.prescribe(self.mine, later)
        await stays.find(about(later, "INSERT"), "the row, by the channel that stays")
        self.assertEqual([change for change in gone_changes.heard if name_of(change) == later], [])

    async def test_a_filter_on_a_column_that_is_not_there_is_told_not_swallowed(self) -> None:
        states = Inbox()
        channel = self.client.channel(unique("room"))
        channel.on_postgres_changes(
            RealtimePostgresChangesListenEvent.All, table="medications", schema="public",
            filter="no_such_column=eq.1", callback=lambda change: None,
        )  # fmt: skip
        subscribing = asyncio.create_task(channel.subscribe(lambda status, error: states.put(status, error)))
        # A join error and a system error both reach this client as CHANNEL_ERROR.
        _, error = await states.find(lambda state: state[0] == "CHANNEL_ERROR", "CHANNEL_ERROR")
        self.assertIn("no_such_column", str(error))
        await channel.unsubscribe()
        await subscribing


def subject_of(token: str) -> str:
    import base64

    part = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["sub"]


if __name__ == "__main__":
    unittest.main()
