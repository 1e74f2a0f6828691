"""Precompute end to end with toy models: resume, staleness, failures, nothing done twice."""

import os
import shutil
import signal
import time

import numpy as np
import pytest
from torture import trials
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks, PhotoError, StoreError, UsageError
from evenlight.cache.files import read_json, write_json
from evenlight.cache.schema import PARTS, parts_from
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.judge import store_judge, tune_clip, write_judge
from evenlight.pipeline.models import Models
from evenlight.pipeline.plan import made_by, plan_unit
from evenlight.pipeline.precompute import precompute, regenerate
from evenlight.pipeline.train import train
from evenlight.stages.photos.find import PhotoSource
from evenlight.stages.priors.judge import Judge
from evenlight.stages.priors.prompts import Scorer

SMALL = ["photo.size=64", "run.unit_size=2", "ladder.regions=3"]
SETTINGS = config.build(overrides=SMALL)


def toys(segmenter: int = 0, clip: int = 0) -> Models:
    return Models(ToySegmenter(segmenter), ToyClip(clip))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 5)
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A complete store and its digest; tests copy what they change."""
    store = tmp_path_factory.mktemp("store") / "S"
    precompute(photos, store, settings=SETTINGS, models=toys())
    with Store.open(store) as opened:
        return store, opened.digest()


def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "S")


def digest(store) -> str:
    with Store.open(store) as opened:
        assert opened.verify() == []
        return opened.digest()


def test_a_second_run_makes_nothing(photos, finished, tmp_path):
    models = toys()
    report = precompute(photos, copy(finished, tmp_path), settings=SETTINGS, models=models)
    assert (report.units_made, report.units_kept) == (0, 3)
    assert models.segmenter.photos == models.clip.photos == 0


def test_touching_moving_and_renaming_the_folder_remakes_nothing(photos, finished, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    for path in moved.iterdir():
        os.utime(path)
    store = copy(finished, tmp_path).rename(tmp_path / "renamed")
    report = precompute(moved, store, settings=SETTINGS, models=toys())
    assert report.units_made == 0
    assert digest(store) == finished[1]


def test_one_changed_byte_of_the_same_size_and_time_remakes_that_unit_only(
    photos, finished, tmp_path
):
    changed = shutil.copytree(photos, tmp_path / "photos")
    target = sorted(changed.iterdir())[0]
    stat = target.stat()
    data = bytearray(target.read_bytes())
    data[-20] ^= 1
    target.write_bytes(data)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = run(changed, copy(finished, tmp_path), prune=True)  # the folder is another one
    assert (report.units_made, report.units_kept) == (1, 2)


def test_a_photo_that_is_added_costs_that_photo_and_gives_the_store_of_all_at_once(
    photos, finished, tmp_path
):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo_004.png").rename(tmp_path / "later.png")
    (folder / "photo_001.png").rename(tmp_path / "edited.png")
    shutil.copy(folder / "photo_000.png", folder / "photo_001.png")
    store, models = tmp_path / "S", toys()
    precompute(folder, store, settings=SETTINGS, models=toys())
    (tmp_path / "later.png").rename(folder / "photo_004.png")
    (tmp_path / "edited.png").replace(folder / "photo_001.png")
    report = precompute(folder, store, settings=SETTINGS, models=models)
    assert (report.photos_made, models.segmenter.photos) == (2, 2)
    assert digest(store) == finished[1]


def test_rows_of_unchanged_photos_are_kept_only_as_far_as_they_are_right(photos, tmp_path, caplog):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("whole", "damaged"):
        precompute(folder, tmp_path / name, settings=SETTINGS, models=toys())
    shutil.copy(folder / "photo_000.png", folder / "photo_001.png")

    other = config.build(overrides=[*SMALL, "judge.prior_good=0.0"])
    models = toys()  # pseudo-GT is made anew of all, the rest of the edited one
    precompute(folder, tmp_path / "whole", settings=other, models=models)
    precompute(folder, tmp_path / "again", settings=other, models=toys())
    assert models.segmenter.photos == 1
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")

    shard = next((tmp_path / "damaged" / "regions").glob("c.0.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    models = toys()
    precompute(folder, tmp_path / "damaged", settings=SETTINGS, models=models)
    assert models.segmenter.photos == 2 and "are made anew" in caplog.text
    assert digest(tmp_path / "damaged")


def test_bad_files_are_named_with_a_reason_and_the_rest_is_made(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "page.jpg").write_bytes(b"<html>not a photo</html>")
    whole = (folder / "photo_000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    report = precompute(folder, tmp_path / "S", settings=SETTINGS, models=toys())
    assert [name for name, _ in report.failed] == ["cut.png", "page.jpg"]
    assert all(reason for _, reason in report.failed)
    assert report.photos == 7
    with Store.open(tmp_path / "S") as store:
        assert len(store.slots("pseudo_gt")) == 5


def test_an_hdf5_file_of_images_makes_the_same_priors_as_the_photos(photos, tmp_path):
    import h5py
    from PIL import Image

    names = sorted(p.stem for p in photos.iterdir())
    with h5py.File(tmp_path / "photos.h5", "w") as file:
        for name in names:
            file[name] = np.asarray(Image.open(photos / f"{name}.png"))
    precompute(tmp_path / "photos.h5", tmp_path / "H", settings=SETTINGS, models=toys())
    precompute(photos, tmp_path / "S", settings=SETTINGS, models=toys())
    with Store.open(tmp_path / "H") as one, Store.open(tmp_path / "S") as other:
        slots = one.slots("pseudo_gt")
        assert len(slots) == 5
        for array in ("photo", "pseudo_gt", "strength"):
            assert np.array_equal(one.rows(array, slots), other.rows(array, slots))


# What each setting decides: part of the store -> setting -> another value than that of SETTINGS.
DECIDES = {
    "photo": {"photo.size": 96, "photo.max_megapixels": 64},
    "regions": {
        "regions.confidence": 0.2, "regions.iou": 0.5, "regions.min_area": 0.01,
        "regions.max_regions": 9, "regions.side": 256,
    },
    "embeddings": {
        "clip.model": "other", "clip.mean": (0.1, 0.2, 0.3), "clip.std": (0.1, 0.2, 0.3),
        "clip.image_size": 96, "ladder.family": "ev", "ladder.offsets": (-1.0, 0.0, 1.0),
        "ladder.regions": 2, "ladder.min_region_area": 0.1,
    },
    "pseudo_gt": {
        "judge.prior_good": 0.2, "pseudo_gt.regional": False, "pseudo_gt.search": "grid",
        "pseudo_gt.max_strength": 1.0,
    },
}  # fmt: skip
ALONGSIDE = {"ladder.family": {"pseudo_gt.search": "grid"}}  # the judge reads film ladders alone
BY_CONTENT = {"regions.segmenter": "elsewhere", "clip.weights": "elsewhere"}  # decide no part


@pytest.mark.parametrize("key", sorted(config.setting_types()))
def test_every_setting_makes_exactly_its_parts_stale(key, finished):
    """A new setting that decides a part and stands not above fails here: say what it touches."""
    with Store.open(finished[0]) as store:
        record = store.record(0)
        models = {"regions": "s", "embeddings": "c", "pseudo_gt": "p"}
        fresh = plan_unit(0, record.photos, None, SETTINGS, models).fingerprints
    values = BY_CONTENT | {k: v for part in DECIDES.values() for k, v in part.items()}
    part = next((part for part, keys in DECIDES.items() if key in keys), None)
    assert (config.affected_by(key) in PARTS) == (key in values)
    flat = config.flatten(config.to_dict(SETTINGS)) | ALONGSIDE.get(key, {})
    changed = config.from_flat(flat | ({key: values[key]} if key in values else {}))
    now = plan_unit(0, record.photos, None, changed, models).fingerprints
    assert tuple(p for p in PARTS if now[p] != fresh[p]) == (parts_from(part) if part else ())


@pytest.mark.parametrize(
    ("models", "remade"),
    [
        (toys(segmenter=1), {"regions", "embeddings", "pseudo_gt"}),
        (toys(clip=1), {"embeddings", "pseudo_gt"}),
    ],
)
def test_other_weights_remake_what_they_make(models, remade, photos, finished, tmp_path):
    report = precompute(photos, copy(finished, tmp_path), settings=SETTINGS, models=models)
    assert set(report.parts_made) == remade
    assert report.parts_made["pseudo_gt"] == 3


def test_regenerate_passes_no_image_through_clip_or_fastsam(finished, tmp_path, monkeypatch):
    store = copy(finished, tmp_path)
    other = Scorer(np_tensor([[0.9, 0.1, 0], [0, 1, 0], [-1, 0, 0]]), 0.05)
    with Store.create_or_open(store) as opened:
        judge = Judge.shipped(ToyClip()).changed("prompts", other.to_tensors())
        write_judge(opened, judge, ToyClip(), tuned=True)

    def forbidden(*_, **__):
        raise AssertionError("regenerate must not load or run a model")

    monkeypatch.setattr("evenlight.stages.priors.fastsam.load_segmenter", forbidden)
    monkeypatch.setattr("evenlight.stages.priors.clip.load_clip", forbidden)
    monkeypatch.setattr(ToyClip, "embed", forbidden)
    monkeypatch.setattr(ToySegmenter, "segment", forbidden)
    report = regenerate(store, settings=SETTINGS)
    assert report.parts_made == {"pseudo_gt": 3}
    assert digest(store) != finished[1]
    assert regenerate(store, settings=SETTINGS).units_made == 0


def test_regenerate_refuses_settings_that_only_precompute_can_follow(finished, tmp_path):
    changed = config.build(overrides=[*SMALL, "regions.iou=0.7"])
    with pytest.raises(StoreError, match=r"regions\.iou.*precompute"):
        regenerate(copy(finished, tmp_path), settings=changed)


def test_a_regenerate_stopped_half_way_is_stale_until_the_same_command_ends_it(finished, tmp_path):
    store = copy(finished, tmp_path)
    grid = config.build(overrides=[*SMALL, "pseudo_gt.search=grid"])

    def stop(_, done, __):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(store, settings=grid, on_progress=stop)
    with pytest.raises(StoreError, match=f"stale.*evenlight regenerate -s {store}'"):
        train(store, tmp_path / "run", settings=grid, models=toys())
    assert regenerate(store, settings=grid).units_made == 2
    assert regenerate(store, settings=SETTINGS).units_made == 3
    assert digest(store) == finished[1]


def made_with_a_proposer(priors) -> dict[str, str]:
    return made_by(priors | {"judge": f"{priors['judge']} and a proposer"})


@pytest.mark.parametrize("by", ["regenerate", "precompute"])
def test_pseudo_gt_of_a_round_of_an_older_version_is_told_of_and_made_anew(
    by, photos, finished, tmp_path, monkeypatch, caplog
):
    store = tmp_path / "S"
    with monkeypatch.context() as older:
        for room in ("plan", "precompute"):
            older.setattr(f"evenlight.pipeline.{room}.made_by", made_with_a_proposer)
        precompute(photos, store, settings=SETTINGS, models=toys())
    note = store / "evenlight" / "round.json"
    write_json(note, {"proposer": "a" * 64, "run": "runs/a"})
    with pytest.raises(StoreError, match=r"stale.*evenlight regenerate"):
        train(store, tmp_path / "run", settings=SETTINGS, models=toys())
    if by == "regenerate":
        report = regenerate(store, settings=SETTINGS)
    else:
        note.write_text("damaged")
        report = precompute(photos, store, settings=SETTINGS, models=toys())
    assert report.parts_made == {"pseudo_gt": 3}
    assert "corrector proposed pseudo-GT" in caplog.text and str(store) in caplog.text
    assert not note.exists() and digest(store) == finished[1]


def test_prompts_that_fail_their_check_leave_the_former_ones(finished, tmp_path):
    store = copy(finished, tmp_path)
    with Store.open(store) as opened:
        before = store_judge(opened, None).fingerprint
    strict = config.build(overrides=[*SMALL, "prompts.min_accuracy=1.1"])
    report = tune_clip(store, settings=strict, clip=TunableToy())
    assert not report.accepted
    assert report.judge == before


def moved_photos(photos, folder, names):
    folder.mkdir()
    for source, target in names.items():
        shutil.copy(photos / source, folder / target)
    return folder


def names_of(store) -> list[str]:
    with Store.open(store) as opened:
        slots = opened.slots("pseudo_gt")
        return sorted(str(opened.index.names[slot]) for slot in slots)


def test_another_folder_adds_its_photos_and_leaves_what_is_done(photos, finished, tmp_path, caplog):
    store = copy(finished, tmp_path)
    more = moved_photos(
        photos, tmp_path / "more", {"photo_000.png": "a.png", "photo_001.png": "b.png"}
    )
    before = dict(enumerate(records(store)))
    models = toys()
    report = precompute(more, store, settings=SETTINGS, models=models)
    assert (report.photos, report.units_made, models.segmenter.photos) == (7, 1, 2)
    assert "5 photos of store" in caplog.text and "stay in it" in caplog.text
    assert names_of(store) == ["a.png", "b.png", *sorted(p.name for p in photos.iterdir())]
    after = records(store)
    assert [after[unit] for unit in before] == list(before.values())
    for folder in (photos, more):
        assert precompute(folder, store, settings=SETTINGS, models=toys()).units_made == 0


def records(store):
    with Store.open(store) as opened:
        assert opened.verify() == []
        return list(opened.records())


def test_photos_are_taken_away_only_on_request_and_told_of(photos, finished, tmp_path, caplog):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo_001.png").unlink()
    store = copy(finished, tmp_path)
    assert precompute(folder, store, settings=SETTINGS, models=toys()).units_made == 0
    assert len(names_of(store)) == 5 and digest(store) == finished[1]
    told = []

    def watch(*_):
        told.append(caplog.text)

    report = precompute(
        folder, store, settings=SETTINGS, models=toys(), prune=True, on_progress=watch
    )
    assert report.units_made == 1 and len(names_of(store)) == 4
    assert "1 photos of store" in told[-1] and "are taken away" in told[-1]


def test_what_a_stopped_run_left_of_another_folder_waits_for_its_files(photos, finished, tmp_path):
    def stop(what, done, _):
        if what == "photos" and done >= 2:
            raise KeyboardInterrupt

    store = tmp_path / "S"
    with pytest.raises(KeyboardInterrupt):
        precompute(photos, store, settings=SETTINGS, models=toys(), on_progress=stop)
    more = moved_photos(photos, tmp_path / "more", {"photo_000.png": "a.png"})
    assert precompute(more, store, settings=SETTINGS, models=toys()).units_made == 1
    with Store.open(store) as opened:
        assert opened.info()["photos"] == {"ok": 3, "failed": 0, "waiting": 3, "holes": 1}
    assert precompute(photos, store, settings=SETTINGS, models=toys()).units_made == 2
    assert len(names_of(store)) == 6


def test_what_cannot_be_made_anew_without_its_file_is_refused_before_anything_is_touched(
    photos, finished, tmp_path
):
    store = copy(finished, tmp_path)
    more = moved_photos(photos, tmp_path / "more", {"photo_000.png": "a.png"})
    larger = config.build(overrides=[*SMALL, "photo.size=96"])
    with pytest.raises(UsageError, match=r"5 photos .*not in .*more .*photo_000\.png.*--prune"):
        precompute(more, store, settings=larger, models=toys())
    assert digest(store) == finished[1] and len(names_of(store)) == 5
    report = precompute(more, store, settings=larger, models=toys(), prune=True)
    assert report.failed == [] and names_of(store) == ["a.png"]


def test_later_parts_of_photos_of_another_folder_are_remade_from_the_cache(
    photos, finished, tmp_path
):
    store = copy(finished, tmp_path)
    more = moved_photos(photos, tmp_path / "more", {"photo_000.png": "a.png"})
    report = precompute(more, store, settings=SETTINGS, models=toys(clip=1))
    assert report.parts_made == {"photo": 1, "regions": 1, "embeddings": 4, "pseudo_gt": 4}
    assert report.failed == [] and len(names_of(store)) == 6


def run(folder, store, **options):
    return precompute(folder, store, settings=SETTINGS, models=toys(), **options)


def test_photos_with_the_names_of_others_from_another_folder_are_refused(
    photos, finished, tmp_path
):
    store = copy(finished, tmp_path)
    other = moved_photos(photos, tmp_path / "other", {"photo_000.png": "photo_001.png"})
    refused = rf"1 photos of {other} have the names of others \(photo_001\.png first\).*{photos}"
    for given in (other, other / "photo_001.png"):
        with pytest.raises(UsageError, match=refused):
            run(given, store)
    assert digest(store) == finished[1]
    run(other, store, prune=True)
    assert names_of(store) == ["photo_001.png"]


def test_an_edited_photo_is_made_anew_unless_it_is_another_folders(photos, tmp_path):
    one, other = (shutil.copytree(photos, tmp_path / name) for name in ("one", "other"))
    (other / "photo_004.png").rename(other / "new.png")
    store = tmp_path / "S"
    run(one, store)
    run(other, store)  # the same bytes under the same names: no others
    shutil.copy(photos / "photo_000.png", one / "photo_004.png")
    assert run(one, store).units_made == 1  # edited, and in no other folder
    assert run(one / "photo_004.png", store).units_made == 0
    shutil.copy(photos / "photo_000.png", one / "photo_001.png")
    with pytest.raises(UsageError, match=r"photo_001\.png first"):
        run(one, store)
    (other / "photo_001.png").unlink()
    assert run(one, store).units_made == 1


def test_a_store_of_an_older_version_knows_the_folder_it_came_from(photos, finished, tmp_path):
    store = copy(finished, tmp_path)
    index = store / "evenlight" / "index.json"
    document = read_json(index)
    document["source"] = document.pop("sources")[0]
    write_json(index, document)
    with Store.open(store) as opened:
        assert opened.index.sources == (str(photos),)


@pytest.mark.parametrize("where", ["read", "decoded", "always"])
def test_a_photo_that_needs_more_memory_than_there_is_is_a_failed_photo(
    where, photos, tmp_path, monkeypatch
):
    read, calls = PhotoSource.read_bytes, []

    def too_large(source):
        calls.append(source.name)
        due = {"read": 1, "decoded": 2, "always": calls.count(source.name)}[where]
        if source.name == "photo_003.png" and calls.count(source.name) == due:
            raise MemoryError
        return read(source)

    monkeypatch.setattr(PhotoSource, "read_bytes", too_large)
    report = run(photos, tmp_path / "S")
    assert [name for name, _ in report.failed] == ["photo_003.png"]
    assert where == "read" or "more memory than there is" in report.failed[0][1]
    assert len(names_of(tmp_path / "S")) == 4


# Failures and settings


def test_a_photo_that_could_not_be_read_for_a_moment_is_made_by_the_next_run(
    photos, finished, tmp_path, monkeypatch
):
    read, calls = PhotoSource.read_bytes, []

    def once_away(source):
        calls.append(source.name)
        # seen by the digest, gone when it is decoded
        if source.name == "photo_001.png" and calls.count(source.name) == 2:
            raise PhotoError("cannot be read: Stale file handle")
        return read(source)

    with monkeypatch.context() as patch:
        patch.setattr(PhotoSource, "read_bytes", once_away)
        report = precompute(photos, tmp_path / "S", settings=SETTINGS, models=toys())
    assert report.failed == [("photo_001.png", "cannot be read: Stale file handle")]
    report = precompute(photos, tmp_path / "S", settings=SETTINGS, models=toys())
    assert (report.failed, report.units_made) == ([], 1)
    assert digest(tmp_path / "S") == finished[1]


def test_a_photo_that_changes_while_it_is_read_is_never_stored_under_its_old_digest(
    photos, finished, tmp_path, monkeypatch
):
    read, calls = PhotoSource.read_bytes, []

    def other_bytes(source):
        calls.append(source.name)
        data = read(source)
        changes = source.name == "photo_001.png" and calls.count(source.name) == 2
        return (photos / "photo_002.png").read_bytes() if changes else data

    with monkeypatch.context() as patch:
        patch.setattr(PhotoSource, "read_bytes", other_bytes)
        report = run(photos, tmp_path / "S")
    said = "the file changed while this run was reading it"
    assert report.failed == [("photo_001.png", said)]
    assert run(photos, tmp_path / "S").units_made == 1 and digest(tmp_path / "S") == finished[1]


def test_failed_photos_are_tried_again_where_asked_and_only_the_part_that_failed(
    photos, finished, tmp_path
):
    class OutOfMemoryOnce(ToySegmenter):
        def segment(self, photo_HW3):
            regions = super().segment(photo_HW3)
            if self.photos == 4:
                raise MemoryError
            return regions

    store = tmp_path / "S"
    models = Models(OutOfMemoryOnce(), ToyClip())
    report = precompute(photos, store, settings=SETTINGS, models=models)
    assert [name for name, _ in report.failed] == ["photo_003.png"]
    assert precompute(photos, store, settings=SETTINGS, models=toys()).units_made == 0
    again = config.build(overrides=[*SMALL, "run.retry_failed=true"])
    report = precompute(photos, store, settings=again, models=toys())
    assert report.parts_made == {"regions": 1, "embeddings": 1, "pseudo_gt": 1}
    assert report.failed == [] and digest(store) == finished[1]
    assert precompute(photos, store, settings=again, models=toys()).units_made == 0


def test_a_pseudo_gt_of_one_colour_is_a_failure_unless_the_photo_is_flat(
    photos, tmp_path, monkeypatch
):
    from PIL import Image

    from evenlight.stages.priors import pseudo_gt

    choose = pseudo_gt.choose

    def all_black(photo, *args):
        made = choose(photo, *args)
        return made | {"pseudo_gt": np.zeros_like(made["pseudo_gt"])}

    monkeypatch.setattr(pseudo_gt, "choose", all_black)
    folder = shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 48), (40, 40, 40)).save(folder / "flat.png")
    report = precompute(folder, tmp_path / "S", settings=SETTINGS, models=toys())
    assert [name for name, _ in report.failed] == sorted(p.name for p in photos.iterdir())
    assert {reason for _, reason in report.failed} == {
        "its pseudo-ground-truth came out as one colour: a model's fault"
    }


def complete(store) -> int:
    return sum(record.complete for record in records(store))


@pytest.mark.parametrize("change", ["photo.size=96", "ladder.regions=5", "ladder.offsets=[-1,0,1]"])
def test_a_change_of_layout_that_is_stopped_costs_the_unit_in_hand_and_may_be_taken_back(
    change, photos, finished, tmp_path
):
    def stop(what, done, _):
        if what == "photos":
            raise KeyboardInterrupt

    store = copy(finished, tmp_path)
    changed = config.build(overrides=[*SMALL, change])
    with pytest.raises(KeyboardInterrupt):
        precompute(photos, store, settings=changed, models=toys(), on_progress=stop)
    assert complete(store) == 3
    assert precompute(photos, store, settings=SETTINGS, models=toys()).units_made == 1
    assert digest(store) == finished[1]
    assert precompute(photos, store, settings=changed, models=toys()).units_made == 3
    fresh = tmp_path / "fresh"
    precompute(photos, fresh, settings=changed, models=toys())
    assert digest(store) == digest(fresh)


def test_a_tuned_judge_stays_until_another_clip_is_used(photos, finished, tmp_path, caplog):
    store = copy(finished, tmp_path)
    other = Scorer(np_tensor([[0.9, 0.1, 0], [0, 1, 0], [-1, 0, 0]]), 0.05)
    tuned = Judge.shipped(ToyClip()).changed("prompts", other.to_tensors())
    with Store.create_or_open(store) as opened:
        write_judge(opened, tuned, ToyClip(), tuned=True)
    larger = config.build(overrides=[*SMALL, "photo.size=96"])
    more = moved_photos(photos, tmp_path / "more", {"photo_000.png": "a.png"})
    with pytest.raises(UsageError, match="--prune"):
        precompute(more, store, settings=larger, models=toys(clip=1))
    with Store.open(store) as opened:
        assert store_judge(opened, None).fingerprint == tuned.fingerprint
    precompute(photos, store, settings=SETTINGS, models=toys(clip=1))
    assert "was tuned for another CLIP" in caplog.text
    with Store.open(store) as opened:
        assert store_judge(opened, None).fingerprint != tuned.fingerprint


def test_settings_become_the_stores_own_only_once_a_unit_is_made_with_them(
    photos, finished, tmp_path
):
    class Refuses(ToySegmenter):
        def segment(self, photo_HW3):
            raise EnvironmentLacks("this setting cannot be followed here")

    store = copy(finished, tmp_path)
    changed = config.build(overrides=[*SMALL, "regions.iou=0.7"])
    models = Models(Refuses(), ToyClip())
    with pytest.raises(EnvironmentLacks):
        precompute(photos, store, settings=changed, models=models)
    with Store.open(store) as opened:
        own = config.build(base=opened.index.settings)
    assert own.regions.iou == SETTINGS.regions.iou
    assert precompute(photos, store, settings=SETTINGS, models=toys()).units_made == 0
    assert digest(store) == finished[1]
    precompute(photos, store, settings=changed, models=toys())
    with Store.open(store) as opened:
        assert opened.index.settings["regions"]["iou"] == 0.7


# Kills


def run_in_child(work) -> int:
    """Fork, do the work, _exit; returns the child's pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_killed_at_random_precompute_resumes_to_the_same_store(photos, finished, tmp_path):
    rng = np.random.default_rng(0)
    started = time.monotonic()
    precompute(photos, tmp_path / "timed", settings=SETTINGS, models=toys())
    whole = time.monotonic() - started
    for trial in range(trials(8, 100)):
        store = tmp_path / f"S{trial}"
        for _ in range(3):
            pid = run_in_child(
                lambda store=store: precompute(photos, store, settings=SETTINGS, models=toys())
            )
            time.sleep(float(rng.uniform(0, whole)))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        complete = done_units(store)
        report = precompute(photos, store, settings=SETTINGS, models=toys())
        assert report.units_kept >= complete
        assert digest(store) == finished[1]


def test_a_second_run_on_one_store_is_refused_naming_the_first(photos, tmp_path):
    store = tmp_path / "S"
    with Store.create_or_open(store, unit_size=2):
        pid = run_in_child(lambda: expect_refusal(photos, store, tmp_path / "said"))
        os.waitpid(pid, 0)
    assert str(os.getpid()) in (tmp_path / "said").read_text()


def expect_refusal(photos, store, said):
    try:
        precompute(photos, store, settings=SETTINGS, models=toys())
    except StoreError as error:
        said.write_text(str(error))


def done_units(store) -> int:
    if not store.exists():
        return 0
    try:
        with Store.open(store) as opened:
            return sum(record.complete for record in opened.records())
    except StoreError:
        return 0


def np_tensor(rows):
    import torch

    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


class TunableToy(ToyClip):
    """A toy whose prompts can be tuned: a context vector is the embedding itself."""

    def token_vectors(self, text):
        return self.embed_text([text])

    def encode_context(self, context_nME, words):
        import torch

        return torch.nn.functional.normalize(
            context_nME.mean(1) + self.embed_text(list(words)), dim=1
        )
