"""Faults that could be made in the product's own code, and for each the test that must fail with it.

`test_planted_faults.py` plants them, one at a time, into copies of the project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One edit, as somebody might make it by mistake."""

    name: str
    file: str
    """Below the project's root."""
    old: str
    """Occurs in the file exactly once."""
    new: str
    test: str
    """The node that must fail: of those that do, the cheapest."""
    why: str
    """What the fault would cost a user."""


LOOP, GUARD, STYLE_RUN, INPUTS, SIGNALS, DETERMINISM = (
    f"fastnst/training/{name}.py" for name in ("trainer", "divergence", "style_run", "inputs", "signals", "determinism")
)
STEP, CAPTURED, HEALTH = (
    f"fastnst/training/step/{name}.py" for name in ("train_step", "graphed_step", "finite_checks")
)
CHECKPOINT, RESUME, DIRECTORY, REJECTED = (
    f"fastnst/training/run_dir/{name}.py" for name in ("checkpoint", "resume", "layout", "rejected_images")
)
MEMORY, SUMMARIES = "fastnst/training/memory/available.py", "fastnst/run_log/writer.py"
CLI, WINOGRAD = "fastnst/cli/main.py", "kernels/fastnst_kernels/winograd.py"
STORAGE, IMAGES, ERRORS = (f"fastnst/{name}.py" for name in ("storage", "images", "errors"))
WEIGHTS, VETTING, DOWNLOAD, STYLE_MODEL = (
    f"fastnst/models/{name}.py" for name in ("weights", "file_checks", "download", "style_model")
)
ORDER, REPLACEMENTS, MANIFEST, WINDOW, DALI, PILLOW, PLAIN = (
    f"fastnst/data/{name}.py"
    for name in ("sampler", "replacements", "manifest", "crop", "loaders/dali", "loaders/pillow", "dali_safe")
)

# What comes back when a run is resumed.

RESUMED = (
    Fault(
        "random state of the CPU not restored",
        STYLE_RUN,
        'torch.set_rng_state(checkpoint.tensors["rng.cpu"])',
        "pass",
        "tests/training/test_resume.py::test_random_numbers_go_on_where_they_were",
        "whatever draws a number in a step draws another one after an interruption",
    ),
    Fault(
        "gradient scaler not restored",
        STEP,
        "self.scaler.load_state_dict(scaler)",
        "pass",
        "tests/training/test_resume.py::test_the_scaler_goes_on_with_its_scale",
        "an fp16 run begins again at the first loss scale, and skips steps that it would not have skipped",
    ),
    Fault(
        "Adam's moments not restored",
        STEP,
        'torch.empty_like(parameter).copy_(value) if key != "step"',
        'torch.zeros_like(parameter) if key != "step"',
        "tests/training/test_resume.py::test_adam_goes_on_with_its_moments",
        "the first steps after an interruption are far too large",
    ),
    Fault(
        "Adam's count of steps not restored",
        STEP,
        "else value.clone().to(self.device)",
        "else torch.zeros_like(value).to(self.device)",
        "tests/training/test_resume.py::test_adam_goes_on_with_its_moments",
        "the correction of Adam's bias begins again",
    ),
    Fault(
        "running statistics left out of what is loaded",
        STEP,
        "self.net.load_state_dict(model)",
        'self.net.load_state_dict({k: v for k, v in model.items() if "running_" not in k}, strict=False)',
        "tests/training/test_resume.py::test_running_statistics_come_back",
        "a net with batch norm paints with the statistics of the last few images",
    ),
    Fault(
        "counts of skipped steps not restored",
        STEP,
        'self.skipped.restore(int(scaler.get("skipped_steps", 0)), int(scaler.get("skipped_in_a_row", 0)))',
        "pass",
        "tests/training/test_divergence.py::test_the_counts_of_skipped_steps_come_back_on_resume",
        "a run that only skips steps is never ended if it is interrupted often enough",
    ),
    Fault(
        "order position one step back on resume",
        LOOP,
        "            start_step=done,\n            rank",
        "            start_step=done - 1 if done else 0,\n            rank",
        "tests/training/test_resume.py::test_the_order_goes_on_at_the_next_place",
        "images are shown twice, and all later ones in other steps",
    ),
    Fault(
        "ranks all read the share of the first",
        ORDER,
        "first = step * self.batch_size + rank * size",
        "first = step * self.batch_size",
        "tests/data/test_sampler.py::test_ranks_share_the_batch_of_one_process",
        "several processes train on the same images",
    ),
    Fault(
        "style model not written again behind its checkpoint",
        STYLE_RUN,
        "if changes or steps_of_run(self.out) != checkpoint.step:",
        "if changes:",
        "tests/training/test_resume.py::test_the_style_model_catches_up_with_its_checkpoint[5]",
        "after a kill between the two writes, the style model stays older than the run",
    ),
    Fault(
        "differences of the configuration ignored",
        DIRECTORY,
        "if differences and not allow_changes:",
        "if False:",
        "tests/training/test_resume_changes.py::test_another_configuration_is_listed_key_by_key",
        "a mistyped option changes the run without a word",
    ),
    Fault(
        "changes since the checkpoint not refused",
        RESUME,
        "if (options or files) and not allow:",
        "if False:",
        "tests/training/test_resume_changes.py::test_what_changed_is_named_refused_and_allowed[exchange_vgg]",
        "the second half of a run is trained against another loss network",
    ),
    Fault(
        "fingerprints not compared",
        RESUME,
        "        if then != today:",
        "        if False:",
        "tests/training/test_resume_changes.py::test_what_changed_is_named_refused_and_allowed[remove_a_image]",
        "images that come or go shift the whole order unnoticed",
    ),
    Fault(
        "number of processes not compared",
        RESUME,
        'if world_size != now["world_size"]:',
        "if False:",
        "tests/training/test_resume_changes.py::test_what_changed_is_named_refused_and_allowed[another_world_size]",
        "sums of gradients change with the number of processes, and nobody is told",
    ),
    Fault(
        "another network allowed",
        RESUME,
        'refuse_another_network(checkpoint.path, configuration, now["configuration"])',
        "pass",
        "tests/training/test_resume_changes.py::test_another_network_is_never_allowed"
        '[True-model.norm=batch-model.norm was "instance", is now "batch"]',
        "weights go on in a network in which they mean something else",
    ),
    Fault(
        "directory not looked at again once it is owned",
        LOOP,
        "            changes = prepare()\n",
        "            changes: list[list[str]] = [[] for _ in runs]\n",
        "tests/training/test_resume.py::test_a_run_that_another_process_finished_meanwhile_is_not_begun_again",
        "of two processes that start at the same time, the second one destroys the finished run of the first",
    ),
)

# The log.

LOGGED = (
    Fault(
        "purge step dropped",
        SUMMARIES,
        "self._writer = _summary_writer(run, purge_step=purge_step, flush_secs=30)",
        "self._writer = _summary_writer(run, flush_secs=30)",
        "tests/run_log/test_writer.py::test_a_resumed_log_has_each_step_once",
        "TensorBoard draws the steps between checkpoint and interruption twice",
    ),
    Fault(
        "purge step one too early",
        SUMMARIES,
        "purge_step = start_step + 1 if start_step else 0",
        "purge_step = start_step",
        "tests/run_log/test_writer.py::test_a_resumed_log_has_each_step_once",
        "TensorBoard loses the point of the checkpoint's own step",
    ),
    Fault(
        "rows of metrics behind the checkpoint not cut",
        SUMMARIES,
        ' if row["step"] <= step]',
        "]",
        "tests/run_log/test_writer.py::test_a_resumed_log_has_each_step_once",
        "metrics.jsonl has some steps twice",
    ),
    Fault(
        "the checkpoint's own row of metrics cut",
        SUMMARIES,
        'if row["step"] <= step]',
        'if row["step"] < step]',
        "tests/run_log/test_writer.py::test_a_resumed_log_has_each_step_once",
        "metrics.jsonl lacks a step after each interruption",
    ),
    Fault(
        "log flushed behind the checkpoint",
        STYLE_RUN,
        "        log.flush()\n        self._save_checkpoint(step)\n",
        "        self._save_checkpoint(step)\n        log.flush()\n",
        "tests/training/test_resume.py::test_a_stopped_run_has_its_style_model_and_its_log",
        "after a power cut the checkpoint knows of steps that the log lacks",
    ),
    Fault(
        "log flushed and not made durable",
        SUMMARIES,
        "                sync_file(path)\n",
        "                pass\n",
        "tests/run_log/test_writer.py::test_a_flushed_log_is_on_the_disk",
        "after a power cut the checkpoint knows of steps that the log lacks",
    ),
    Fault(
        "style model written before its checkpoint",
        STYLE_RUN,
        "        self._save_checkpoint(step)\n        self._save_model(step)\n\n",
        "        self._save_model(step)\n        self._save_checkpoint(step)\n\n",
        "tests/training/test_resume.py::test_the_style_model_catches_up_with_its_checkpoint[4]",
        "a style model has steps that no checkpoint can go on from",
    ),
    Fault(
        "NaN written into the metrics",
        SUMMARIES,
        "value if math.isfinite(value) else None",
        "value",
        "tests/run_log/test_writer.py::test_what_json_cannot_hold_is_null",
        "no other program can read metrics.jsonl",
    ),
    Fault(
        "links in a run directory followed",
        SUMMARIES,
        "flags | os.O_NOFOLLOW | os.O_CLOEXEC",
        "flags | os.O_CLOEXEC",
        "tests/security/test_runs.py::test_a_link_to_nothing_makes_nothing_there[metrics.jsonl]",
        "a run directory from elsewhere makes files wherever it likes",
    ),
)

# Files that are whole or not there.

DURABLE = (
    Fault(
        "content not made durable before its name",
        STORAGE,
        "            os.fsync(file.fileno())\n",
        "",
        "tests/test_storage.py::test_content_is_on_the_disk_before_the_name_is",
        "after a power cut a file has its name and no content",
    ),
    Fault(
        "name not made durable",
        STORAGE,
        "        temporary.replace(path)\n        sync_folder(path.parent)\n",
        "        temporary.replace(path)\n",
        "tests/test_storage.py::test_content_is_on_the_disk_before_the_name_is",
        "after a power cut a file that was reported as written is the old one",
    ),
    Fault(
        "content copied in place instead of renamed",
        STORAGE,
        "        temporary.replace(path)\n",
        "        path.write_bytes(temporary.read_bytes())\n",
        "tests/training/test_io_faults.py::test_any_call_of_an_atomic_write_may_fail[ENOSPC]",
        "on a full disk half a file takes the place of the whole one",
    ),
    Fault(
        "names of new folders not made durable",
        STORAGE,
        "            sync_folder(new.parent)\n",
        "            pass\n",
        "tests/training/test_io_faults.py::test_folders_that_are_made_are_durable",
        "after a power cut the whole run directory may be gone",
    ),
    Fault(
        "temporary file left behind",
        STORAGE,
        "            temporary.unlink(missing_ok=True)\n",
        "            pass\n",
        "tests/test_storage.py::test_no_space_left",
        "a full disk stays full",
    ),
    Fault(
        "leftovers of a killed process not removed",
        STYLE_RUN,
        "            remove_leftovers(self.out / name)\n",
        "            pass\n",
        "tests/training/test_resume.py::test_leftovers_of_a_killed_process_go_with_the_next_save",
        "each kill leaves a file for ever",
    ),
    Fault(
        "run directory not locked",
        STORAGE,
        "        lock.acquire()\n",
        "",
        "tests/test_storage.py::test_a_second_process_is_refused_until_the_first_ends",
        "two processes write into one run",
    ),
    Fault(
        "run trained in without its lock",
        LOOP,
        "                    locks.enter_context(lock_run(run))\n",
        "                    pass\n",
        "tests/training/test_run_dir_lock.py::test_a_run_is_not_given_away_before_its_last_line",
        "two processes write into one run",
    ),
)

# Checkpoints.

CHECKPOINTS = (
    Fault(
        "manifest written first",
        CHECKPOINT,
        '    contents[MANIFEST] = _json_bytes({"format": FORMAT, "step": step, "files": files})\n',
        '    manifest = _json_bytes({"format": FORMAT, "step": step, "files": files})\n'
        "    contents = {MANIFEST: manifest, **contents}\n",
        "tests/training/test_io_faults.py::test_content_then_name_then_what_is_old",
        "a manifest vouches for files that are not there yet",
    ),
    Fault(
        "copied to its name instead of renamed",
        CHECKPOINT,
        "        _put_in_place(part, path)\n",
        "        shutil.copytree(part, path, dirs_exist_ok=True)\n",
        "tests/training/test_io_faults.py::test_content_then_name_then_what_is_old",
        "a kill leaves half a checkpoint under a whole one's name",
    ),
    Fault(
        "checkpoint's name not made durable",
        CHECKPOINT,
        "        _put_in_place(part, path)\n        sync_folder(folder)\n",
        "        _put_in_place(part, path)\n",
        "tests/training/test_io_faults.py::test_content_then_name_then_what_is_old",
        "old checkpoints go before the new one is sure to be there",
    ),
    Fault(
        "old ones removed before the new one is durable",
        CHECKPOINT,
        "        _tidy(folder)\n        part.mkdir()\n",
        "        _tidy(folder)\n"
        "        for _, old in _by_step(folder)[: 1 - keep or None]:\n"
        "            _discard(old)\n"
        "        part.mkdir()\n",
        "tests/training/test_checkpoint.py::test_no_space_left_costs_nothing_that_was_there[0]",
        "a full disk costs the last checkpoint there was",
    ),
    Fault(
        "one checkpoint too few kept",
        CHECKPOINT,
        "if old_step <= step][:-keep]:",
        "if old_step <= step][: 1 - keep]:",
        "tests/training/test_checkpoint.py::test_old_ones_go_and_what_is_not_a_checkpoint_stays",
        "where the newest one is damaged there is none to fall back on",
    ),
    Fault(
        "SHA-256 not checked",
        CHECKPOINT,
        "if hashlib.sha256(data).hexdigest() != sha256:",
        "if False:",
        "tests/training/test_checkpoint_damage.py::test_all_damage_is_found[state.safetensors]",
        "a flipped bit becomes a weight",
    ),
    Fault(
        "size not checked",
        CHECKPOINT,
        "if len(data) != size:",
        "if False:",
        "tests/training/test_checkpoint.py::test_damage_is_named_and_passed_over[truncate-CheckpointDamaged-bytes,-state.json]",
        "a file cut short is told as if its content had changed",
    ),
    Fault(
        "manifest may name further files",
        CHECKPOINT,
        "if set(files) != {TENSORS, STATE}:",
        "if not {TENSORS, STATE} <= set(files):",
        "tests/training/test_checkpoint.py::test_a_manifest_names_nothing_beside_its_files",
        "a checkpoint from elsewhere makes the program read any file",
    ),
    Fault(
        "step of the manifest not held against the folder's name",
        CHECKPOINT,
        'if path.name != f"step_{step:08d}":',
        "if False:",
        "tests/training/test_checkpoint.py::test_a_renamed_checkpoint_is_refused",
        "an old checkpoint under a new name is taken for the newest",
    ),
    Fault(
        "form of the manifest not checked",
        CHECKPOINT,
        'if data != _json_bytes({"format": FORMAT, "step": step, "files": entries}):',
        "if False:",
        "tests/training/test_checkpoint_damage.py::test_every_byte_of_a_manifest_counts",
        "some damage to the manifest itself goes unseen",
    ),
    Fault(
        "damaged newest one not passed over",
        CHECKPOINT,
        '            notify(f"checkpoint passed over: {error}")\n',
        "            raise\n",
        "tests/training/test_resume.py::test_a_damaged_newest_one_is_named_and_the_run_ends_the_same",
        "one bad sector ends the run for good",
    ),
    Fault(
        "passed over without a word",
        CHECKPOINT,
        '            notify(f"checkpoint passed over: {error}")\n',
        "            pass\n",
        "tests/training/test_resume.py::test_a_damaged_newest_one_is_named_and_the_run_ends_the_same",
        "hours of work go, and nobody learns why",
    ),
    Fault(
        "missing told as damaged",
        CHECKPOINT,
        '        raise CheckpointMissing(f"{file} is missing") from error\n',
        '        raise CheckpointDamaged(f"{file} is missing") from error\n',
        "tests/training/test_checkpoint_damage.py::test_all_damage_is_found[state.json]",
        "whoever looks for a bad disk looks for the wrong thing",
    ),
    Fault(
        "run of damaged checkpoints begun again",
        RESUME,
        "if checkpoint is None and (steps := checkpoint_steps(run)):",
        "if checkpoint is None and (steps := checkpoint_steps(run)) and not steps:",
        "tests/training/test_resume.py::test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again",
        "what might still be rescued is written over",
    ),
    Fault(
        "replaced checkpoint not put back",
        CHECKPOINT,
        "    _put_back(folder)\n    candidates",
        "    candidates",
        "tests/training/test_io_faults.py::test_a_process_killed_while_it_replaces_a_checkpoint_loses_none",
        "a kill between two renames costs the checkpoint",
    ),
    Fault(
        "half a checkpoint of a killed process not removed",
        CHECKPOINT,
        '    for path in folder.glob(".step_*.part"):\n        shutil.rmtree(path, ignore_errors=True)\n',
        "",
        "tests/training/test_resume.py::test_leftovers_of_a_killed_process_go_with_the_next_save",
        "each kill in a save takes up the space of a checkpoint for ever",
    ),
)

# Images.

IMAGES = (
    Fault(
        "failed image not noted",
        REJECTED,
        "            append_row(self._path, late_row(failure))\n",
        "            pass\n",
        "tests/training/test_train_with_bad_images.py::test_a_image_that_goes_away_is_replaced_listed_and_told[pillow]",
        "nobody can find out which images were not used",
    ),
    Fault(
        "note of a failed image not durable",
        REPLACEMENTS,
        "        os.fsync(descriptor)\n",
        "        pass\n",
        "tests/training/test_train_with_bad_images.py::test_a_images_failure_is_on_the_disk_before_the_batch_is_trained_on",
        "after a power cut a resumed run takes other images than it had taken",
    ),
    Fault(
        "failed image used again after a resume",
        LOOP,
        "            earlier=late,\n",
        "            earlier=(),\n",
        "tests/training/test_train_with_bad_images.py::test_what_failed_in_a_step_that_is_done_stays_out",
        "a resumed run takes other images than it would have taken",
    ),
    Fault(
        "failed image that came back used again after a resume",
        REPLACEMENTS,
        "if failure.step <= done or not _readable(folder, failure.entry)]",
        "if not _readable(folder, failure.entry)]",
        "tests/training/test_train_with_bad_images.py::test_what_failed_in_a_step_that_is_done_stays_out",
        "a resumed run takes other images than it would have taken",
    ),
    Fault(
        "image that is gone shifts all others on resume",
        INPUTS,
        "manifest = with_failed(read_manifest(config, notify), late)",
        "manifest = read_manifest(config, notify)",
        "tests/training/test_train_with_bad_images.py::test_a_resumed_run_does_without_the_same_images_from_the_same_steps[5-pillow]",
        "a run in which an image vanished cannot be resumed",
    ),
    Fault(
        "the image before stands in instead of the next",
        REPLACEMENTS,
        "index = (index + 1) % len",
        "index = (index - 1) % len",
        "tests/data/test_replacements.py::test_known_failures_hold_from_their_step_on",
        "runs resumed by another version go on with other images",
    ),
    Fault(
        "image replaced a step too late",
        REPLACEMENTS,
        "failure is not None and failure.step <= step + 1",
        "failure is not None and failure.step <= step",
        "tests/data/test_replacements.py::test_known_failures_hold_from_their_step_on",
        "an image that cannot be read is read again",
    ),
    Fault(
        "threshold of failures ignored",
        REPLACEMENTS,
        "        if failed <= self._allowed:\n",
        "        if True:\n",
        "tests/data/test_replacements.py::test_above_the_threshold_training_ends_and_names_the_first[pillow]",
        "a run goes on with the few images of a dying disk that can still be read",
    ),
    Fault(
        "death of DALI not met",
        DALI,
        "                self._pipeline = self._recover(error)\n",
        "                raise\n",
        "tests/data/test_replacements.py::test_dali_dies_of_it_and_is_rebuilt_in_place",
        "one bad image ends hours of training",
    ),
    Fault(
        "batches that DALI had read ahead lost with it",
        DALI,
        "        self._feed.seek(self._step)\n",
        "        self._feed.seek(self._feed._next_step or self._step)\n",
        "tests/data/test_replacements.py::test_dali_dies_of_it_and_is_rebuilt_in_place",
        "after a bad image all others come in other steps",
    ),
    Fault(
        "changed file not checked again",
        WINDOW,
        "    if mtime != entry.mtime:\n",
        "    if False:\n",
        "tests/data/test_replacements.py::test_a_damaged_png_is_found_by_both_though_dali_would_take_it"
        "[flip_a_byte_of_the_checksum]",
        "DALI trains on damaged pixels without a word",
    ),
    Fault(
        "checksums of PNG not checked",
        MANIFEST,
        "    check_whole(data, image)\n",
        "",
        "tests/data/test_manifest.py::test_png_damage_that_pillow_overlooks",
        "the loaders differ on damaged images",
    ),
    Fault(
        "memory of checks does not look at the time",
        MANIFEST,
        "(earlier.size, earlier.mtime) == (size, mtime)",
        "earlier.size == size",
        "tests/data/test_manifest.py::test_remembered_until_size_or_time_changes",
        "an image that was exchanged is trusted unseen",
    ),
    Fault(
        "images of one colour trained on",
        INPUTS,
        "progress=progress, flat=False)",
        "progress=progress)",
        "tests/training/test_trainer.py::test_a_image_of_one_colour_is_not_trained_on",
        "gradients overflow, and the run ends as if it had diverged",
    ),
    Fault(
        "limit on pixels is Pillow's warning alone",
        IMAGES,
        "if Image.MAX_IMAGE_PIXELS is not None and pixels_of_image > Image.MAX_IMAGE_PIXELS:",
        "if False:",
        "tests/test_images.py::test_what_is_refused_names_file_reason_and_remedy[large.png]",
        "images of up to 179 million pixels are decoded",
    ),
    Fault(
        "Pillow's limit on pixels taken off",
        IMAGES,
        "MAX_FILE_BYTES = 1 << 30\n",
        "MAX_FILE_BYTES = 1 << 30\nImage.MAX_IMAGE_PIXELS = None\n",
        "tests/test_images.py::test_pillows_limit_on_pixels_stays_on",
        "50 kB fill the memory",
    ),
    Fault(
        "Ctrl-C ends the processes that load images",
        PILLOW,
        "        signal.signal(signum, signal.SIG_IGN)\n",
        "        pass\n",
        "tests/data/test_loaders.py::test_ctrl_c_reaches_all_and_stops_none",
        "the step that is to be saved lacks its images",
    ),
    Fault(
        "processes that load images outlive their parent",
        PILLOW,
        "    threading.Thread(target=_end_with_parent, daemon=True).start()\n",
        "",
        "tests/data/test_loaders.py::test_workers_end_with_their_parent",
        "each kill leaves processes behind, for ever",
    ),
)

# Files from elsewhere, and the network.

SECURE = (
    Fault(
        "pickles of any kind loaded",
        WEIGHTS,
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "tests/security/test_network.py::test_a_payload_does_not_run_where_nobody_looked_at_it_before",
        "a weights file runs code",
    ),
    Fault(
        "SHA-256 of cached weights not checked",
        WEIGHTS,
        "        if digest == source.sha256:\n",
        "        if digest:\n",
        "tests/security/test_network.py::test_cached_weights_are_checked_in_full_at_every_load",
        "damaged or exchanged weights are used as torchvision's",
    ),
    Fault(
        "SHA-256 of downloaded weights not checked",
        DOWNLOAD,
        "if (found := sha256_of(part)) == source.sha256:",
        "if found := sha256_of(part):",
        "tests/models/test_download.py::test_download_refuses_wrong_bytes",
        "whoever sits on the line chooses the weights",
    ),
    Fault(
        "weights that are no numbers accepted",
        WEIGHTS,
        "if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):",
        "if not tensor.is_floating_point():",
        "tests/models/test_weights.py::test_load_vgg19_refuses_other_content",
        "each run with them diverges in its first step",
    ),
    Fault(
        "names in pickles not checked",
        VETTING,
        'if name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):',
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_other_names_in_pickles",
        "one of two locks against code in weights files is open",
    ),
    Fault(
        "pickles may build names from parts",
        VETTING,
        'if name in ("STACK_GLOBAL", "INST", "OBJ") or name.startswith("EXT"):',
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_other_names_in_pickles",
        "one of two locks against code in weights files is open",
    ),
    Fault(
        "nested tuples not counted",
        VETTING,
        "if shared > _MAX_SHARED_TUPLES:",
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_nested_tuples",
        "a file of 200 bytes takes all time",
    ),
    Fault(
        "checksums of records not checked",
        VETTING,
        "    if found != checksum:\n",
        "    if False:\n",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_flipped_bit",
        "a flipped bit becomes a weight",
    ),
    Fault(
        "compressed records accepted",
        VETTING,
        "if method or packed != length:",
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_compressed_record",
        "a small file fills the memory",
    ),
    Fault(
        "header of any length parsed",
        VETTING,
        '    if length > _MAX_HEADER_BYTES:\n        raise UnsafeFileError(f"its header',
        '    if False:\n        raise UnsafeFileError(f"its header',
        "tests/models/test_file_checks.py::test_check_safetensors_file_refuses_long_header",
        "a style model of 100 MB takes gigabytes",
    ),
    Fault(
        "overlapping records accepted",
        VETTING,
        "if offset < end_of_last or start + length > directory_start:",
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_overlapping_records",
        "two readers see two files in one",
    ),
    Fault(
        "TensorBoard open to every machine",
        CLI,
        '@click.option("--host", default="localhost"',
        '@click.option("--host", default="0.0.0.0"',
        "tests/security/test_network.py::test_tensorboard_listens_where_it_is_asked_to[localhost]",
        "everybody on the network can look at the run",
    ),
)

# Numbers.

NUMBERS = (
    Fault(
        "state not looked at before it is saved",
        GUARD,
        "            if not bool(torch.isfinite(tensor).all()):\n",
        "            if False:\n",
        "tests/training/test_divergence.py::test_what_goes_wrong_after_the_check_of_a_step_is_not_saved_with_it[second_moment]",
        "a checkpoint that can never be trained on takes the place of good ones",
    ),
    Fault(
        "findings of the steps ignored",
        GUARD,
        "        if found:\n",
        "        if found and False:\n",
        "tests/training/test_divergence.py::test_what_is_not_finite_is_named_and_never_saved[total-fp32-nan]",
        "a run whose loss is NaN goes on until its end",
    ),
    Fault(
        "gradients not looked at",
        STEP,
        "bad = not_finite([*losses.values(), *gradients.values(), *self._state.values()])",
        "bad = not_finite([*losses.values(), *map(torch.zeros_like, gradients.values()), *self._state.values()])",
        "tests/training/test_divergence.py::test_a_fault_that_is_read_late_has_the_step_and_the_name_it_had",
        "what went wrong first is not named",
    ),
    Fault(
        "style model of any numbers saved",
        STYLE_MODEL,
        '    if bad := _not_finite(tensors):\n        raise DataError(f"cannot save',
        '    if (bad := _not_finite(tensors)) and False:\n        raise DataError(f"cannot save',
        "tests/models/test_style_model.py::test_save_style_model_refuses_nonfinite_weights",
        "a model that paints black takes the place of a good one",
    ),
    Fault(
        "any number of skipped steps in a row borne",
        GUARD,
        "if in_a_row >= limit:",
        "if False:",
        "tests/training/test_divergence.py::test_too_many_skipped_steps_in_a_row_end_the_run",
        "an fp16 run that learns nothing goes on until its end",
    ),
    Fault(
        "skipped steps counted in a row though one was made",
        HEALTH,
        "(in_a_row + 1) * skipped",
        "in_a_row + skipped",
        "tests/training/test_divergence.py::test_skipped_steps_are_counted_in_all_and_in_a_row",
        "sound fp16 runs are ended",
    ),
    Fault(
        "first bad step forgotten",
        HEALTH,
        "is_first = bad & (self._first_bad_steps == 0)",
        "is_first = bad",
        "tests/training/test_divergence.py::test_health_keeps_the_first_step_of_each_name",
        "a fault that is read late has the wrong step",
    ),
    Fault(
        "advice of one image too many",
        MEMORY,
        "1 + (room - needed_memory(single)) // per_image",
        "2 + (room - needed_memory(single)) // per_image",
        "tests/training/test_memory.py::test_the_batch_size_is_the_largest_that_fits[fp32]",
        "what is said to fit does not",
    ),
    Fault(
        "deterministic algorithms not asked for",
        DETERMINISM,
        "    torch.use_deterministic_algorithms(deterministic)\n",
        "",
        "tests/training/test_determinism.py::test_an_operation_without_a_deterministic_algorithm_is_an_error_only_then",
        "equal runs differ",
    ),
    Fault(
        "train.deterministic not heeded by a run",
        LOOP,
        "            determinism.algorithms(config.train),\n",
        "",
        "tests/training/test_determinism.py::test_the_steps_of_a_run_are_made_in_its_mode",
        "equal runs differ",
    ),
    Fault(
        "cuBLAS not told",
        DETERMINISM,
        '        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")\n',
        "        pass\n",
        "tests/training/test_determinism.py::test_cublas_is_told_before_it_is_used",
        "a deterministic run on a GPU ends in its first step",
    ),
)

# Steps that are replayed.

REPLAYED = (
    Fault(
        "step's number is that of the capture",
        CAPTURED,
        "make_steps(self._number, self._images, steps)",
        "make_steps(WARM_UP + 1, self._images, steps)",
        "tests/training/test_graphed_step.py::test_the_first_bad_step_is_named",
        "whatever goes wrong later is said to have happened in step 4",
    ),
    Fault(
        "counts of skipped steps replaced and not written to",
        HEALTH,
        "self._counts.copy_(torch.stack([total + skipped, (in_a_row + 1) * skipped]))",
        "self._counts = torch.stack([total + skipped, (in_a_row + 1) * skipped])",
        "tests/training/test_graphed_step.py::test_skipped_steps_are_counted_in_replays",
        "an fp16 run on a GPU that learns nothing goes on until its end",
    ),
    Fault(
        "terms handed out that the next replay overwrites",
        CAPTURED,
        "self._packed.clone().unbind()",
        "self._packed.unbind()",
        "tests/training/test_graphed_step.py::test_captured_steps_are_launched_ones",
        "what is read late is the loss of another step",
    ),
    Fault(
        "images not copied to where the graph reads them",
        CAPTURED,
        "        self._streams.copy(self._images, batch)\n",
        "",
        "tests/training/test_graphed_step.py::test_captured_steps_are_launched_ones",
        "a run learns from one batch for ever, or from nothing",
    ),
    Fault(
        "step that failed to be captured not forgotten",
        CAPTURED,
        "                step.discard_step()\n",
        "                pass\n",
        "tests/training/test_graphed_step.py::test_where_a_capture_fails_launched_steps_go_on",
        "an fp16 run ends where it could have gone on without a graph",
    ),
    Fault(
        "state that was loaded not seen",
        STEP,
        'int(scaler.get("skipped_in_a_row", 0)))\n        self.loads += 1\n',
        'int(scaler.get("skipped_in_a_row", 0)))\n',
        "tests/training/test_graphed_step.py::test_a_state_that_is_loaded_goes_on_wherever_it_was_saved",
        "replays go on with moments that are not the run's any more",
    ),
    Fault(
        "batch brought before the step that reads the last one is through",
        CAPTURED,
        "                if slot.free is not None:\n",
        "                if False:\n",
        "tests/training/test_cuda_streams.py::test_each_step_reads_its_batch_in_whatever_order_the_streams_run",
        "steps learn from images that are half overwritten",
    ),
)

# Signals.

STOPPED = (
    Fault(
        "signal that was swallowed is forgotten",
        SIGNALS,
        "        self.signum = self.signum or self._raised\n",
        "",
        "tests/training/test_signals.py::test_a_signal_that_was_swallowed_all_the_same_is_not_forgotten",
        "Ctrl-C at the wrong moment does nothing",
    ),
    Fault(
        "signal that waited not raised where nothing need wait",
        SIGNALS,
        "            if self.signum is not None:\n                raise stopped_by(self.signum)\n",
        "",
        "tests/training/test_signals.py::test_a_signal_that_has_waited_raises_where_nothing_need_wait",
        "Ctrl-C before the first step waits for minutes",
    ),
    Fault(
        "second signal does not force",
        SIGNALS,
        "if self._deferred and self.signum is None:",
        "if self._deferred:",
        "tests/training/test_signals.py::test_the_first_signal_waits_and_the_second_raises",
        "a run that hangs in a step cannot be stopped by Ctrl-C",
    ),
    Fault(
        "signal while cleaning up does not force",
        SIGNALS,
        "        if self._raised is not None:\n",
        "        if False:\n",
        "tests/training/test_signals.py::test_a_signal_after_one_that_raised_ends_the_process_at_once",
        "a process that hangs while it ends cannot be stopped by Ctrl-C",
    ),
    Fault(
        "hang-up not heeded",
        SIGNALS,
        "STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)",
        "STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)",
        "tests/training/test_signals.py::test_each_stop_signal_is_heeded",
        "a terminal that closes costs all since the last checkpoint",
    ),
    Fault(
        "signal that is ignored from the start heeded",
        SIGNALS,
        "[signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]",
        "STOP_SIGNALS",
        "tests/training/test_signals.py::test_a_signal_that_is_ignored_from_the_start_stays_ignored",
        "a run below nohup ends with its terminal",
    ),
    Fault(
        "exit code is the signal's number",
        ERRORS,
        "self.exit_code = 128 + signum",
        "self.exit_code = signum",
        "tests/training/test_signals.py::test_before_training_a_signal_raises_at_once",
        "scripts take a stopped run for one that failed",
    ),
    Fault(
        "step under way not saved",
        LOOP,
        "ends = step == last or signum\n",
        "ends = step == last\n",
        "tests/training/test_resume.py::test_a_stopped_run_has_its_style_model_and_its_log",
        "the message says that the step is saved, and it is not",
    ),
    Fault(
        "signal in the last step not told",
        LOOP,
        "if signum := self.group.all_reduce_max(self.stop.signum or 0)[0]:",
        "if (signum := self.group.all_reduce_max(self.stop.signum or 0)[0]) and False:",
        "tests/training/test_resume.py::test_a_signal_in_the_last_step_is_told_though_all_is_done",
        "a script that asked for a stop is told that there was none",
    ),
    Fault(
        "exit code of refusing storage",
        ERRORS,
        'beneath them cannot be used."""\n\n    exit_code = 3',
        'beneath them cannot be used."""\n\n    exit_code = 2',
        "tests/test_storage.py::test_no_space_left",
        "scripts take a full disk for a wrong option",
    ),
)

# Several styles in one process.
TOGETHER = (
    Fault(
        "steps of a style that is ahead made again",
        LOOP,
        "styles = [style for style in self.styles if style.done < step]",
        "styles = list(self.styles)",
        "tests/training/test_multi_style.py::test_a_run_killed_between_the_saves_of_two_styles_ends_like_one_that_was_not",
        "after a kill between two saves, a style has been trained twice on the same images",
    ),
    Fault(
        "list of the styles written too late",
        LOOP,
        "                    folder.write()\n",
        "                    pass\n",
        "tests/training/test_multi_style.py::test_a_run_killed_before_all_styles_have_begun",
        "a run killed at its start cannot be resumed, and stands in the way of a new one",
    ),
    Fault(
        "failed images of the first style's list only",
        LOOP,
        "failure for run in runs for failure in",
        "failure for run in runs[:1] for failure in",
        "tests/training/test_multi_style.py::test_a_image_that_fails_is_noted_for_each_style",
        "killed between two lists, the resumed run takes other images",
    ),
    Fault(
        "weights of later styles begin elsewhere",
        STYLE_RUN,
        "        torch.manual_seed(config.train.seed)\n",
        "        torch.manual_seed(config.train.seed) if beside is None else None\n",
        "tests/training/test_multi_style.py::test_each_style_is_trained_as_if_alone",
        "a style comes out otherwise than in a run of its own",
    ),
)

# Convolutions in fewer products.

FEWER_PRODUCTS = (
    Fault(
        "filters not turned round for the way back",
        WINOGRAD,
        "g = g.flip(1) if backward else g",
        "g = g.flip(0).flip(0) if backward else g",
        "tests/kernels/test_winograd.py::test_one_pixel_gives_the_kernel_turned_round",
        "the gradient that reaches the transform net is not that of the loss",
    ),
    Fault(
        "every band of tiles cut from the top",
        WINOGRAD,
        "_Band(slice(sample, sample + 1), first, min(",
        "_Band(slice(sample, sample + 1), 0, min(",
        "tests/kernels/test_winograd.py::test_it_is_pytorchs_convolution",
        "of large images the upper part is computed over and over, and the rest is what lay in memory",
    ),
    Fault(
        "windows begin a pixel before the image whatever the border",
        WINOGRAD,
        "top = _TILE * band.first - padding",
        "top = _TILE * band.first - 1",
        "tests/kernels/test_winograd.py::test_it_is_pytorchs_convolution",
        "unpadded convolutions see the image a pixel further down",
    ),
    Fault(
        "a weight's gradient without the sum over bands",
        WINOGRAD,
        "du.baddbmm_(",
        "du.zero_().baddbmm_(",
        "tests/kernels/test_winograd.py::test_it_is_pytorchs_convolution",
        "the transform net learns from the last rows of the last image alone",
    ),
    Fault(
        "a ReLU that takes NaN for 0",
        WINOGRAD,
        "place.relu_()",
        "place.nan_to_num_(0).relu_()",
        "tests/kernels/test_winograd.py::test_what_is_not_finite_stays_so_and_in_its_tiles",
        "training goes on with what is no number any more",
    ),
    Fault(
        "few bits where large numbers cancel",
        WINOGRAD,
        "x.dtype not in (torch.float32, torch.float64)",
        "x.dtype == torch.float16",
        "tests/kernels/test_winograd.py::test_it_takes_full_precision_on_a_cpu_alone",
        "in bf16 the error of a convolution is many times what it has to be",
    ),
)

FAULTS = (
    *RESUMED,
    *LOGGED,
    *DURABLE,
    *CHECKPOINTS,
    *IMAGES,
    *SECURE,
    *NUMBERS,
    *REPLAYED,
    *STOPPED,
    *TOGETHER,
    *FEWER_PRODUCTS,
)
