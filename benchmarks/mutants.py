"""Safeties removed one at a time: some test must fail for each (`python -m benchmarks.mutants`).

Each row names a safety, the exact text that holds it, what stands there without it, and the tests
that must notice.  Every mutant is tried in a copy of the checkout; a test that fails kills it.
"""

import argparse
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    safety: str
    file: str
    text: str  # stands once in the file
    instead: str
    tests: str  # arguments of pytest; "test_x.py::name" lies in tests/


FILES, SCHEMA, RECORDS = "cache/files.py", "cache/schema.py", "cache/records.py"
SHARDS, STORE, SETTINGS = "cache/shards.py", "cache/store.py", "stages/settings.py"
BUCKET = "cache/bucket.py"
PRECOMPUTE, UNITS, SCHEDULE = "pipeline/precompute.py", "pipeline/units.py", "pipeline/schedule.py"
PLAN = "pipeline/plan.py"
CHECKPOINT, RUN, TRAINING, LOSSES = (
    f"stages/corrector/{name}.py" for name in ("checkpoint", "run", "training", "losses")
)
WEIGHTS, FASTSAM = "stages/priors/fastsam_weights.py", "stages/priors/fastsam.py"
REPORT, DOORS = "pipeline/report.py", "test_doors.py"
SERVE, GUARD = "pipeline/serve.py", "pipeline/serve_guard.py"
EVERY_SETTING = "test_precompute.py -k every_setting"

MUTANTS = (
    # Files
    Mutant("the data of a file is on disk", FILES,
           "            os.fsync(descriptor)\n", "",
           "test_files.py::test_file_and_name_are_on_disk_in_that_order_when_a_write_returns"),
    Mutant("the name of a file is on disk", FILES,
           "        raise\n    sync_folder(path.parent)\n", "        raise\n",
           "test_files.py::test_file_and_name_are_on_disk_in_that_order_when_a_write_returns"),
    Mutant("a file is written under a temporary name", FILES,
           'path.with_name(f".{start}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")',
           "path\n    path.unlink(missing_ok=True)",
           "test_files.py::test_a_failed_write_leaves_the_old_file_and_no_temporary"),
    Mutant("a file that is being written is not cleaned", FILES,
           "                system.lock(descriptor)  # so that", "                pass  # so that",
           "test_files.py -k being_written"),
    Mutant("a failed write leaves no temporary", FILES,
           "        temporary.unlink(missing_ok=True)\n", "",
           "test_files.py::test_a_failed_write_leaves_the_old_file_and_no_temporary"),
    Mutant("a write that the system cuts is taken up", FILES,
           "            while remaining:\n", "            if remaining:\n",
           "test_files.py::test_a_write_that_the_system_cuts_into_pieces_is_whole"),
    Mutant("the name of a new folder is on disk", FILES,
           "    folder.mkdir(exist_ok=True)\n    sync_folder(folder.parent)\n",
           "    folder.mkdir(exist_ok=True)\n",
           "test_files.py::test_a_new_folder_is_on_disk_name_by_name"),
    Mutant("JSON is sealed", FILES,
           "        intact = seal == sha256_bytes(canonical_json(document))", "        intact = True",
           "test_files.py::test_any_flipped_bit_of_sealed_json_is_an_error_or_changes_nothing"),
    Mutant("NaN is no JSON", FILES, "allow_nan=False", "allow_nan=True",
           "test_files.py -k json_does_not_have"),
    Mutant("a document has the types it should", FILES,
           "_adapter(kind).validate_python(document)",
           "kind(**{k: v for k, v in document.items() if k in kind.__dataclass_fields__})",
           "test_documents.py::test_a_refusal_names_file_and_field"),
    Mutant("one writer at a time", FILES,
           "        try:\n            system.lock(descriptor)\n",
           "        try:\n",
           "test_files.py::test_of_two_runs_one_is_refused_by_name_and_a_killed_one_is_taken_over"),
    Mutant("a child does not keep the lock of a killed parent", FILES,
           'if hasattr(os, "register_at_fork"):  # Windows forks nothing\n'
           "    os.register_at_fork(after_in_child=_forget_locks_in_child)\n", "",
           "test_files.py::test_a_child_that_outlives_a_killed_holder_does_not_keep_its_lock"),
    Mutant("a run that lost its lock stops", FILES,
           "    if found != token:", "    if False:",
           "test_store.py::test_a_worker_stops_writing_when_its_run_is_gone"),
    Mutant("litter of killed runs goes", FILES,
           "    for path in litter:\n        path.unlink(missing_ok=True)\n", "",
           "test_files.py::test_litter_is_removed_and_nothing_else"),
    Mutant("folders of living processes stay", FILES,
           "                os.close(lock_folder(left))\n", "",
           "test_files.py -k private_folders"),
    # Schema and records
    Mutant("a store of another schema is refused", SCHEMA,
           "    if found != SCHEMA:", "    if False:",
           "test_store.py::test_a_record_of_another_schema_is_an_incomplete_unit"),
    Mutant("a unit has a sane number of photos", SCHEMA,
           '        assert 1 <= self.unit_size <= MOST_PHOTOS, f"unit_size {self.unit_size}"\n', "",
           "test_documents.py::test_a_refusal_names_file_and_field"),
    Mutant("other bytes are another photo", SCHEMA,
           "[(p.name, p.sha256) for p in self.photos] == [(p.name, p.sha256) for p in photos]",
           "[p.name for p in self.photos] == [p.name for p in photos]",
           "test_store.py -k without_those_before_it"),
    Mutant("units of absent photos take no new one", SCHEMA,
           "            if name is None and new and slot // self.unit_size not in closed:",
           "            if name is None and new:",
           "test_store.py::test_units_that_must_stay_take_no_new_photo"),
    Mutant("a shard has the digest of its record", RECORDS,
           "    if digest != stored.sha256:", "    if False:",
           "test_store_damage.py::test_any_flipped_bit_of_a_part_is_seen"),
    Mutant("a record is of its unit", RECORDS,
           "    if record.unit != unit or len(record.photos) != unit_size:", "    if False:",
           "test_store_damage.py::test_records_that_changed_places_are_incomplete_units"),
    Mutant("a missing note that a record names is damage", RECORDS,
           "        if name not in there:", "        if False:",
           "test_notes.py::test_a_note_that_a_record_names_and_that_is_gone_is_damage"),
    Mutant("a photo counts only under its name", RECORDS,
           "        if photo.status == OK and photo.name == name\n",
           "        if photo.status == OK\n",
           "test_cli.py -k forgotten"),
    # Shards and store
    Mutant("a chunk has a checksum", SHARDS, '"checksum": True', '"checksum": False',
           "test_store.py::test_every_array_has_a_checksum_in_each_chunk_and_on_the_table_of_chunks"),
    Mutant("empty entries are stored", SHARDS,
           '{"write_empty_chunks": True}', '{"write_empty_chunks": False}',
           "test_store.py -k entries_equal_to_fill"),
    Mutant("zarr.json is sealed", SHARDS, "    if not intact:", "    if False:",
           "test_store_damage.py::test_damaged_records_and_documents_end_in_an_incomplete_unit_or_a_refusal"),
    Mutant("the old record goes before its shards", STORE,
           "            if before is not None and kept != before.parts:", "            if False:",
           "test_store_kills.py::test_shards_are_on_disk_before_the_record_and_the_old_record_gone_before_them"),
    Mutant("the lock is confirmed before the record", STORE,
           "            self._check_holder()  # else a run that took over could meet our shards\n", "",
           "test_store.py::test_a_run_that_is_taken_over_between_shards_and_record_writes_no_record"),
    Mutant("a shard that differs is not decoded", STORE,
           "                    raise shard\n", "                    continue\n",
           "test_store_damage.py::test_any_flipped_bit_of_a_part_is_seen"),
    Mutant("a unit that is written anew is checked anew", STORE,
           "        self._let_go(unit)\n        with self._writing(f\"unit {unit}\"):\n            if before",
           "        with self._writing(f\"unit {unit}\"):\n            if before",
           "test_store.py::test_rewriting_a_part_drops_those_made_from_it_and_keeps_those_before"),
    Mutant("an array stays while a unit has it", STORE,
           "found.keys() - wanted.keys() - held", "found.keys() - wanted.keys()",
           "test_store.py::test_an_array_that_is_no_longer_wanted_goes_once_no_unit_has_it"),
    Mutant("a folder of something else is no store", STORE,
           "            if not records.may_become_store(place):", "            if False:",
           "test_store.py::test_what_is_no_store_is_refused_in_words"),
    Mutant("the unit size is fixed", STORE,
           "        if self.index.names and index.unit_size != self.index.unit_size:",
           "        if False:",
           "test_store.py::test_the_unit_size_is_fixed_when_a_store_is_made"),
    Mutant("parts are written on those before them, of the same photos", STORE,
           "        if {*kept, *parts} != set(schema.PARTS[:num_parts]):", "        if False:",
           "test_store.py::test_a_part_is_not_written_without_those_before_it_of_the_same_photos"),
    # Buckets
    Mutant("the lock of a bucket changes hands on a condition", BUCKET,
           ", Body=text.encode(\"ascii\"), **condition\n", ", Body=text.encode(\"ascii\")\n",
           "test_bucket.py -k see_a_free_lock"),
    Mutant("a lock that is renewed is not taken over", BUCKET,
           "        if found.token and found.age < self._bucket.lease:", "        if False:",
           "test_bucket.py -k second_run_is_refused"),
    Mutant("a run renews its lock", BUCKET,
           "        while not self._ended.wait(", "        while False and not self._ended.wait(",
           "test_bucket.py -k longer_than_a_lease"),
    Mutant("a service without conditional writes is refused", BUCKET,
           "        self._refuse_unconditional()\n", "",
           "test_bucket.py -k without_conditional"),
    Mutant("an answer that is cut off is asked for again", BUCKET,
           "TRIES = 3  # to read", "TRIES = 1  # to read",
           "test_bucket.py -k cut_off"),
    Mutant("a renewed lock is another version", BUCKET,
           "        self._renewals += 1  #", "        pass  #",
           "test_bucket.py -k renewed_meanwhile"),
    Mutant("a lock of another run is not ours", BUCKET,
           "            if found.token != self.token:\n                return False\n", "",
           "test_bucket.py -k 'see_a_free_lock or writes_nothing_more'"),
    Mutant("a lock whose answer was lost is ours", BUCKET,
           "            if found.token != self.token:\n", "            if True:\n",
           "test_bucket.py -k answer_was_lost"),
    Mutant("what cannot be looked at is not lost", "cache/errors.py",
           "class OutOfReach(EvenlightError):", "class OutOfReach(StoreError):",
           "test_bucket.py -k cannot_be_looked_at"),
    Mutant("a bucket that is not there is no missing file", BUCKET,
           " and answer[\"Error\"].get(\"Code\") != \"NoSuchBucket\":", ":",
           "test_bucket.py -k no_bucket"),
    # Settings
    Mutant("regions.confidence decides regions", SETTINGS,
           'confidence: float = a_share(0.1, "regions"', 'confidence: float = a_share(0.1, "run"',
           EVERY_SETTING),
    Mutant("clip.image_size decides embeddings", SETTINGS,
           '"embeddings",\n        "side CLIP sees', '"run",\n        "side CLIP sees', EVERY_SETTING),
    Mutant("ladder.offsets decides embeddings", SETTINGS,
           '1.4, 2.0),\n        "embeddings"', '1.4, 2.0),\n        "pseudo_gt"', EVERY_SETTING),
    Mutant("numbers have bounds", SETTINGS,
           "        return self.low <= value <= self.high and", "        return",
           "test_settings.py"),
    # Precompute
    Mutant("rows are kept of unchanged photos alone", PLAN,
           "(p.name, p.sha256) in now]", "True]", "test_precompute.py -k is_added"),
    Mutant("rows are kept as far as they are right", PLAN,
           "if record.holds(part.name, recorded[part.name])]", "if part.name in record.parts]",
           "test_precompute.py -k kept_only"),
    Mutant("a photo is of the digest that it is stored under", UNITS,
           "    if sha256_bytes(data) != photo.sha256:", "    if False:",
           "test_precompute.py -k changes_while_it_is_read"),
    Mutant("NaN of a model stays out of the store", UNITS,
           "        if not np.isfinite(values[array.name]).all():", "        if False:",
           "test_aspects.py -k numbers_that_are_not_finite"),
    Mutant("a file that was away for a moment is tried again", UNITS,
           "sha256=UNREAD if isinstance(error, _UnreadError) else photo.sha256",
           "sha256=photo.sha256",
           "test_precompute.py -k for_a_moment"),
    Mutant("a worker that sees no file records nothing", UNITS,
           "    _refuse_unseen(task)\n", "", "test_cluster.py -k sees_no_file"),
    Mutant("two threads of a worker take turns", UNITS,
           "    with _one_unit, Store.attach", "    with Store.attach",
           "test_cluster.py -k take_turns"),
    Mutant("MemoryError is of one photo", "pipeline/failures.py",
           "    except MemoryError as error:", "    except ZeroDivisionError as error:",
           "test_precompute.py -k more_memory"),
    Mutant("a pseudo-GT of one colour is a failure", "pipeline/parts.py",
           '    if of_one_colour and np.ptp(have["photo"], axis=(0, 1)).max() > FLAT:',
           "    if False:", "test_precompute.py -k one_colour"),
    Mutant("what cannot be made anew is refused", PRECOMPUTE,
           "    _refuse_without_files(store, plans, sources, photos)\n", "",
           "test_precompute.py -k refused_before_anything"),
    Mutant("photos of the same names are refused", PRECOMPUTE,
           "        _refuse_namesakes(store, recorded, folder, sources, digests)\n", "        pass\n",
           "test_precompute.py -k names_of_others"),
    Mutant("settings enter the store once used", PRECOMPUTE,
           "    store.write_index(index)\n",
           "    store.write_index(index)\n    _record_settings(store, tools.settings)\n",
           "test_precompute.py -k only_once_a_unit"),
    Mutant("whole paths are sent", PRECOMPUTE, "Path(photos).absolute()", "Path(photos)",
           "test_cluster.py -k relative_paths"),
    Mutant("another folder adds its photos", PRECOMPUTE,
           "{} if prune else absent", "{}", "test_precompute.py -k another_folder_adds"),
    Mutant("the task of a worker that died is given to another", SCHEDULE,
           "                elif tries > 1:", "                elif False:",
           "test_schedule.py -k though_one_dies"),
    Mutant("a worker that died is replaced", SCHEDULE,
           "            self.process = None\n        if isinstance", "        if isinstance",
           "test_schedule.py -k in_the_middle"),
    Mutant("workers clean up when they are stopped", SCHEDULE,
           "    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what is being written is cleaned up\n", "",
           "test_schedule.py -k end_with_their_run"),
    Mutant("a scheduler that is gone is one sentence", SCHEDULE,
           "    except (FutureCancelledError, CommClosedError) as error:",
           "    except ZeroDivisionError as error:", "test_cluster.py -k scheduler"),
    Mutant("a judge of NaN is refused", "pipeline/models.py",
           "        assert all(bool(x.isfinite().all()) for x in judge.tensors.values()),"
           ' "NaN or infinity"\n', "",
           "test_documents.py -k judge_of_nan"),
    Mutant("stale units are not trained on", "pipeline/train.py",
           "        if plan.todo:\n", "        if False:\n", "test_train_run.py -k stale"),
    # Training
    Mutant("a checkpoint's name is on disk", CHECKPOINT,
           "    building.rename(final)\n    sync_folder(folder)\n", "    building.rename(final)\n",
           "test_checkpoint.py -k its_name_is_on_disk"),
    Mutant("a checkpoint is built under another name", CHECKPOINT,
           '    building = folder / f"{_BUILDING}{final.name}"\n', "    building = final\n",
           "test_checkpoint.py -k every_io"),
    Mutant("what was written is read back", CHECKPOINT,
           '"info": info})\n    load_tensors(stem)\n', '"info": info})\n',
           "test_checkpoint.py -k stores_something_else"),
    Mutant("tensors have their digest", CHECKPOINT,
           "    if len(data) != seal.bytes or sha256_bytes(data) != seal.tensors:",
           "    if len(data) != seal.bytes:", "test_checkpoint.py -k 110_damaged"),
    Mutant("two checkpoints are kept", CHECKPOINT, "KEEP = 2 ", "KEEP = 1 ",
           "test_checkpoint.py -k last_two"),
    Mutant("the best checkpoint is kept", CHECKPOINT, " - {best}:", ":",
           "test_checkpoint.py -k last_two"),
    Mutant("a corrector's weights are finite", CHECKPOINT,
           "    if not all(bool((x.abs() < LARGEST).all()) for x in weights.values()):",
           "    if False:", "test_checkpoint.py -k or_nan"),
    Mutant("a run of other settings is not resumed", RUN,
           "    if changed and not _only_more_steps(changed):", "    if False:",
           "test_training.py -k other_settings"),
    Mutant("a run whose folder is gone writes no log", RUN,
           '        record = {"step": step} | record\n        self.lock.confirm()\n',
           '        record = {"step": step} | record\n', "test_training.py -k folder_vanishes"),
    Mutant("a run whose folder is gone writes no checkpoint", RUN,
           "untouched.\"\"\"\n        self.lock.confirm()\n", "untouched.\"\"\"\n",
           "test_training.py -k folder_vanishes"),
    Mutant("a damaged line of the log is dropped", RUN,
           "    with suppress(ValueError, KeyError, TypeError, RecursionError):",
           "    with suppress():", "test_training.py -k damaged_lines"),
    Mutant("training stops before a NaN is taken in", TRAINING,
           '            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"])):',
           "            if False:", "test_training.py -k nan_stops"),
    Mutant("a refused run keeps its settings.toml", TRAINING,
           "        run = begin(",
           '        atomic_write(lock.path.parent / "settings.toml", kept.toml.encode())\n'
           "        run = begin(", "test_training.py -k leaves_the_settings"),
    Mutant("a Triton kernel that is wrong on this device is not used", "stages/corrector/scan.py",
           'return "" if right else', 'return "" if True else',
           "test_scan.py -k cannot_do_here"),
    Mutant("a Triton kernel that fails on this device is not used", "stages/corrector/scan.py",
           "    except Exception as error:  # of", "    except MemoryError as error:  # of",
           "test_scan.py -k cannot_do_here"),
    Mutant("the scan of a large map reaches beyond 2^31 values", "stages/corrector/scan_triton.py",
           "(run // blocks).to(tl.int64)", "(run // blocks)",
           "test_scan.py -k addresses_of_64_bits"),
    Mutant("the Triton scan writes no channel beyond its own", "stages/corrector/scan_triton.py",
           "tl.store(end + entry_D, state_D, mask=channel_D < num_channels)",
           "tl.store(end + entry_D, state_D)",
           "test_scan.py -k triton_scan_equals_the_loop"),
    Mutant("regions do not differ in a photo that is all but surely good",
           "stages/priors/opinion.py", "return min(1.0, max(0.0, doubt)) * near", "return near",
           "test_predictor.py -k all_but_surely_good"),
    Mutant("pseudo-GT keeps regions together where a photo is all but surely good",
           "stages/priors/pseudo_gt.py", "regional * apart_by_region(", "apart_by_region(",
           "test_pseudo_gt.py -k all_but_surely_good"),
    Mutant("strengths of regions end where the photo's edges are", "stages/priors/pseudo_gt.py",
           "radius=BORDER, eps=EDGES", "radius=BORDER, eps=9",
           "test_pseudo_gt.py -k ends_where"),
    Mutant("a spot goes with what is around it", "stages/priors/pseudo_gt.py",
           "is_small[patches_HW] & (rest_HW > 0)", "rest_HW > 1",
           "test_pseudo_gt.py -k small_patch"),
    Mutant("what is in no region is judged as one more", "stages/priors/pseudo_gt.py",
           "of_label = np.full(256, apart[-1], np.float32)",
           "of_label = np.zeros(256, np.float32)", "test_pseudo_gt.py -k one_more"),
    Mutant("regions keep the photo's strength on average", "stages/priors/opinion.py",
           "return wanted - np.average(wanted, weights=areas_R)", "return wanted",
           "test_pseudo_gt.py -k one_more"),
    Mutant("a second opinion of a photo's strength is heard", "stages/priors/pseudo_gt.py",
           "opinion = judging.seconded(opinion, judge.second_opinion(cached))", "pass",
           "test_pseudo_gt.py -k second_opinion"),
    Mutant("the second opinion of a photo does not hear the first", "stages/priors/judge.py",
           "given[..., 0])", "given[..., 1])", "test_judge.py -k does_not_hear"),
    Mutant("in training regions are told apart about their photo's strength",
           "stages/corrector/told.py", "apart = (apart - (apart * areas).sum())",
           "apart = (apart + wanted)", "test_streams.py -k rightly"),
    Mutant("borders of what is told lie off", "stages/corrector/told.py",
           "labels_HW.roll((down, right), (0, 1))", "labels_HW",
           "test_streams.py -k lie_a_little_off"),
    Mutant("fills come where a region is darkened alone", "stages/corrector/network.py",
           "(-given_B1HW / WHOLE_FROM).clamp(0, 1)", "share * (given_B1HW.mean() < 0)",
           "test_network.py -k not_darkened"),
    Mutant("the judge's own map is carried up by its own lines", "stages/corrector/apply.py",
           "given = given or (", "given = (",
           "test_predictor.py -k no_halo"),
    Mutant("a picture on white is not filled", "stages/corrector/predictor.py",
           "return self._on_curve(photo_HW3, strength) if strength else None", "pass",
           "test_predictor.py -k on_white"),
    Mutant("regions of a picture on white are not asked", "stages/priors/pseudo_gt.py",
           'alike = not settings.pseudo_gt.regional or judging.is_on_white(cached["tones"][0])',
           "alike = not settings.pseudo_gt.regional", "test_pseudo_gt.py -k on_white"),
    Mutant("a photo is not good whose regions are too far apart", "stages/priors/opinion.py",
           "replace(opinion, p_good=0.0) if uneven", "replace(opinion, p_good=0.0) if not opinion",
           "test_judge.py -k too_far_apart"),
    Mutant("regions differ less in a photo that is far off as a whole",
           "stages/priors/opinion.py", "max(0.0, doubt)) * near", "max(0.0, doubt))",
           "test_judge.py -k far_off"),
    Mutant("a region without area does not count", "stages/priors/judge.py",
           "around = (areas * here).sum(-2, keepdim=True)",
           "around = here.mean(-2, keepdim=True)", "test_judge.py -k without_area"),
    Mutant("the rest is the photo without its regions", "stages/priors/ladder.py",
           "cells[-1] = 1 - cells[:-1].sum(0)", "cells[-1] = 1",
           "test_pseudo_gt.py -k every_cell"),
    # Several ranks, and photos beyond memory
    Mutant("a rank's share is of the rows of all ranks", LOSSES,
           "ranks.total(weight.sum()).clamp_min", "weight.sum().clamp_min",
           "test_ranks.py -k three_ranks"),
    Mutant("gradients are those of all ranks", TRAINING,
           "            ranks.add_up(gradients)\n", "", "test_ranks.py -k three_ranks"),
    Mutant("a NaN of one rank stops all", TRAINING,
           'figures = ranks.totals({"loss": loss, **parts})',
           'figures = ALONE.totals({"loss": loss, **parts})', "test_ranks.py -k nan_of_one_rank"),
    Mutant("only rank 0 writes checkpoints", TRAINING,
           "    if leads and (validated", "    if (validated", "test_ranks.py -k three_ranks"),
    Mutant("ranks see one folder", TRAINING,
           "    if steps != [run.step] * ranks.count:", "    if False:",
           "test_ranks.py -k different_folders"),
    Mutant("a rank that is gone ends the others in a sentence", "stages/corrector/ranks.py",
           "    except RuntimeError as error:  # Gloo", "    except KeyError as error:  # Gloo",
           "test_ranks.py -k is_killed"),
    Mutant("what all ranks refuse is said once", "stages/corrector/ranks.py",
           "        if not self.leads:\n            self.each(0)\n        yield\n"
           "        if self.leads:\n            self.each(0)\n", "        yield\n",
           "test_ranks.py -k torchrun_trains"),
    Mutant("ultralytics waits for no rank", FASTSAM,
           'os.environ.pop("WORLD_SIZE", None)', 'os.environ.get("WORLD_SIZE")',
           "test_ranks.py -k ultralytics"),
    Mutant("photos in memory are bounded", "stages/corrector/cached.py",
           "        if len(self._kept) < keep:", "        if True:",
           "test_cached.py -k room_for"),
    Mutant("readers stop with the training", "stages/corrector/cached.py",
           "readers.shutdown(cancel_futures=True)", "readers.shutdown()",
           "test_cached.py -k not_begun"),
    Mutant("training is not begun without room for its steps", "pipeline/training_photos.py",
           "    if room < least:", "    if False:", "test_train_run.py -k room_for_three_steps"),
    # Doors
    Mutant("ultralytics loads without trust", FASTSAM,
           '        ULTRALYTICS_SAFE_LOAD="1",\n', "", DOORS + " -k ultralytics"),
    Mutant("ultralytics keeps its settings out of the home", FASTSAM,
           "        YOLO_CONFIG_DIR=str(config),\n", "", DOORS + " -k ultralytics"),
    Mutant("ultralytics stays offline", FASTSAM, '        YOLO_OFFLINE="true",\n', "",
           "test_fastsam_weights.py -k opens_no_connection"),
    Mutant("ultralytics installs nothing", FASTSAM, '        YOLO_AUTOINSTALL="false",\n', "",
           DOORS + " -k ultralytics"),
    Mutant("weights are stored, not compressed", WEIGHTS,
           "        if any(entry.compress_type != ZIP_STORED for entry in entries):",
           "        if False:", "test_fastsam_weights.py -k compressed"),
    Mutant("zip entries do not overlap", WEIGHTS,
           "        if sum(entry.file_size for entry in entries) > path.stat().st_size:",
           "        if False:", DOORS + " -k overlap"),
    Mutant("weights name nothing foreign", WEIGHTS,
           "        if foreign := [n for n in names"
           " if not n.startswith(allowed) and n not in HARMLESS]:\n",
           "        if foreign := []:\n", "test_fastsam_weights.py -k runs_a_command"),
    Mutant("modules that hold each other end", WEIGHTS,
           '            raise ValueError(f"it holds more than {MAX_MODULES} modules")\n',
           "            return\n",
           "test_fastsam_weights.py -k hold_each_other"),
    Mutant("a profile does not swell", "stages/photos/metadata.py",
           "inflater.decompress(packed, _MAX_ICC)", "inflater.decompress(packed)",
           DOORS + " -k swells"),
    Mutant("a photo's size is bounded by its header", "stages/photos/decode.py",
           "        _refuse_size(opened, max_megapixels)\n", "",
           "test_images_malformed.py -k 'the_limit_is_the_setting'"),
    Mutant("scans times pixels are bounded", "stages/photos/decode.py",
           "        _refuse_scans(data, opened, format)\n", "",
           "test_images_malformed.py -k thousand_scans"),
    Mutant("a photo is corrected in sRGB's primaries", "pipeline/correct_photo.py",
           "    inside = photo.in_srgb\n", "    inside = photo.pixels\n",
           "test_images_gamut.py -k corrected_the_same"),
    Mutant("colours beyond sRGB are given back", "stages/photos/gamut.py",
           "        after += (light - held) * np.minimum(gain, _MOST)[..., None]\n", "",
           "test_images_gamut.py -k beyond_srgb"),
    Mutant("a link that leads to itself is one photo's failure", "pipeline/outputs.py",
           "    return Path(os.path.realpath(path))\n", "    return path.resolve()\n",
           "test_correct.py -k leads_to_itself"),
    Mutant("a closed stream is refused", "pipeline/console.py",
           "    if None in (sys.stdin, sys.stdout, sys.stderr):\n", "    if False:\n",
           "test_cli.py -k closed_stream"),
    Mutant("names in a report end no script", REPORT,
           r'.replace("<", "\\u003c")', "", "test_report.py -k ends_no_script"),
    Mutant("a server answers to its own name", GUARD,
           '    if not _is_ours(named.rpartition(":")[0] or named, host):', "    if False:",
           "test_serve.py -k only_our_own_page"),
    Mutant("another page changes nothing", GUARD,
           '    if request.method not in ("GET", "HEAD") and origin != f"http://{named}":',
           "    if False:",
           "test_serve.py -k another_page"),
    Mutant("another page looks at nothing", GUARD,
           '    if request.url.path != "/" and asked_by not in ("same-origin", "none"):',
           "    if False:",
           "test_serve.py -k only_our_own_page"),
    Mutant("what is dropped is bounded", SERVE,
           "                        if file.tell() + len(chunk) > room:",
           "                        if False:",
           "test_serve.py -k uploads_are_bounded"),
    Mutant("a file that was edited by hand is saved over on request alone",
           "pipeline/serve_photos.py", " and is_foreign(job):", " and False:",
           "test_serve.py -k only_on_request"),
    Mutant("a second signal ends at once", "pipeline/exits.py",
           "    stop_at_once()  # the second one\n", "", DOORS + " -k signal"),
    Mutant("the path of --csv is tried first", "cli.py",
           "        try_to_write(csv)\n", "        pass\n", "test_evaluate.py -k found_out_before"),
    Mutant("memory that lacks is a sentence", "cli.py",
           "    except (MemoryError, ModuleNotFoundError) as", "    except ModuleNotFoundError as",
           "test_cli.py -k one_sentence_and_their_code"),
)  # fmt: skip


def copied_checkout(folder: Path) -> Path:
    """What git tracks, or would, as an importable copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".typing").mkdir()
    (folder / ".typing" / "evenlight").symlink_to("..")
    return folder


def preload() -> None:
    """Import what takes seconds once, here, for all the children that are forked from this process.
    Not evenlight itself, and not ultralytics, whose switches it sets."""
    for name in (
        "torch",
        "zarr",
        "cv2",
        "h5py",
        "hypothesis",
        "pydantic",
        "safetensors.torch",
        "typer",
    ):
        importlib.import_module(name)


def passes(copy: Path, tests: str, most_s: int) -> bool | None:
    """Whether the tests pass in the copy, in a child; None where they do not run at all."""
    child = os.fork()
    if child == 0:
        os.chdir(copy)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        here = str(copy / ".typing")
        # workers that tests start import this module anew, from the copy
        sys.path[:] = [here, str(copy), *(path for path in sys.path if Path(path) != ROOT)]
        os.environ |= {"PYTHONPATH": here, "PYTEST_ADDOPTS": ""}
        signal.alarm(most_s)
        options = ["-x", "-q", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, *shlex.split(f"tests/{tests}")]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: True, 1: False}.get(status, False if status < 0 else None)  # below 0: by a signal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose safety or file holds this text")
    parser.add_argument("--most-seconds", type=int, default=300, help="for the tests of one mutant")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.safety or options.only in m.file]
    lived = []
    preload()
    sys.dont_write_bytecode = True  # a mutant may have the size and the second of the file before
    with tempfile.TemporaryDirectory() as folder:
        copy = copied_checkout(Path(folder))
        for mutant in chosen:
            begun, path = time.monotonic(), copy / mutant.file
            whole = path.read_text()
            path.write_text(whole.replace(mutant.text, mutant.instead, 1))
            verdict = passes(copy, mutant.tests, options.most_seconds)
            path.write_text(whole)
            word = {True: "LIVES", False: "killed", None: "NO TEST RAN"}[verdict]
            if verdict is not False:
                lived.append(mutant.safety)
            seconds = time.monotonic() - begun
            print(f"{word:12} {seconds:5.0f} s  {mutant.file}: {mutant.safety}", flush=True)
    print(f"{len(chosen) - len(lived)} of {len(chosen)} mutants killed")
    return bool(lived)


if __name__ == "__main__":
    sys.exit(main())
