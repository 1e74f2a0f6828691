"""A store through any history of photos, changes, kills and damage, against what it should hold."""

import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_store_kills import die_at_call, in_child, remembering
from torture import trials
from toy_store import ARRAYS, FIRST, PARTS, SPECS, UNIT, precompute, rows

from evenlight.cache import shards
from evenlight.cache.errors import StoreError
from evenlight.cache.store import Store

NUMBERS = st.integers(1, 10**6)


class AnyHistory(RuleBasedStateMachine):
    """names, versions: what was asked for last.  done: a run to its end came after it."""

    def __init__(self):
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=memory))
        self.path = self.folder / "s.zarr"
        self.names, self.versions, self.done = {"a", "b"}, dict(FIRST), False

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(name=st.sampled_from("abcdefghij"))
    def add_or_remove_a_photo(self, name):
        self.names = self.names ^ {name} or {name}
        self.done = False

    @rule(part=st.sampled_from(PARTS), version=st.sampled_from("123"))
    def change_what_decides_a_part(self, part, version):
        for later in PARTS[PARTS.index(part) :]:
            self.versions[later] = f"{version} after {part}"
        self.done = False

    @rule()
    def run_to_the_end(self):
        precompute(self.path, self.names, self.versions)
        self.done = True

    @rule(call=st.integers(1, 150))
    def run_and_be_killed(self, call):
        before = {r.unit: r for r in self.opened().records()} if self.is_store() else {}

        def killed():
            die_at_call(call, torn=call % 2 == 0)
            precompute(self.path, self.names, self.versions)

        status = os.waitstatus_to_exitcode(os.waitpid(in_child(killed), 0)[1])
        assert status in (0, 137)
        self.done = status == 0
        if self.is_store():
            assert self.opened().verify() == []
            whole = {r.unit for r in self.opened().records() if r.complete}
            lost = {unit for unit, record in before.items() if record.complete} - whole
            assert len(lost) <= 1  # the unit in hand

    @precondition(lambda self: self.done)
    @rule(number=NUMBERS)
    def damage_is_seen_and_mended(self, number):
        damaged = random.Random(number).choice(
            sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != "lock")
        )
        data = bytearray(damaged.read_bytes())
        data[number % len(data)] ^= 1 << number % 7
        damaged.write_bytes(data)
        try:
            damages = self.opened().verify()
            self.check_rows()
        except StoreError:
            damages = [True]
        shard = damaged.name.startswith("c.")
        assert damages or not shard  # a flip in the indentation of JSON is no damage
        with Store.create_or_open(self.path, unit_size=UNIT) as store:
            for damage in store.verify():
                if damage.unit is not None and damage.part:
                    store.drop(damage.unit, damage.part)
        self.run_to_the_end()

    @precondition(lambda self: self.done)
    @invariant()
    def holds_what_was_asked_for(self):
        store = self.opened()
        assert {name for name in store.index.names if name} == self.names
        assert all(record.complete for record in store.records())
        assert store.verify() == [] and len(store.slots("pseudo_gt")) == len(self.names)
        self.check_rows()

    def check_rows(self):
        store = self.opened()
        for unit in range(store.index.num_units):
            found = store.read(unit, ARRAYS)
            for spec in SPECS:
                wanted = rows(spec, store.index.unit_names(unit), self.versions[spec.part])
                assert found[spec.name].tobytes() == wanted.tobytes(), spec.name

    def opened(self) -> Store:
        return Store.open(self.path)

    def is_store(self) -> bool:
        try:
            self.opened()
        except StoreError:
            return False
        return True


def test_any_history_ends_in_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(shards, "encode_shard", remembering(shards.encode_shard))
    AnyHistory.TestCase.settings = settings(
        max_examples=trials(40, 5000), stateful_step_count=12, deadline=None
    )
    AnyHistory.TestCase().runTest()
