"""Faults in the product's own code, and for each the test that must fail with it.

They guard exact resume, crash safety, security and numerics. `test_planted_faults.py` plants them, one at a time, into
a copy of the project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One edit, as somebody might make it by mistake."""

    name: str
    file: str
    old: str
    """Occurs in the file exactly once."""
    new: str
    test: str
    """The cheapest test that must fail."""


TRAIN, TRAINER, STYLE_RUN, INPUTS, DIVERGENCE, SIGNALS, DETERMINISM = (
    f"fastnst/training/{name}.py"
    for name in ("train", "trainer", "style_run", "inputs", "divergence", "signals", "determinism")
)
STEP, GRAPHED = (f"fastnst/training/step/{name}.py" for name in ("train_step", "graphed_step"))
CHECKPOINT, RESUME, LAYOUT = (f"fastnst/training/run_dir/{name}.py" for name in ("checkpoint", "resume", "layout"))
LOG, STORAGE, WEIGHTS = "fastnst/run_log/writer.py", "fastnst/storage/files.py", "fastnst/models/weights.py"
FILE_CHECKS, WINOGRAD = "fastnst/models/files/file_checks.py", "kernels/fastnst_kernels/cpu/winograd.py"

TRAINING = "tests/training"
EQUALS = f"{TRAINING}/test_resume.py::test_train_resume_equals_an_undisturbed_run"
STATES = f"{TRAINING}/test_resume.py::test_train_resume_restores_random_states_and_running_statistics"
CHANGES = f"{TRAINING}/test_resume_changes.py::test_train_resume"
ORDER = f"{TRAINING}/test_io_faults.py::test_save_checkpoint_writes_content_then_name_and_then_removes_old"
WRITE = "tests/storage/test_storage.py::test_write_atomic_syncs_the_content_before_it_renames"
PICKLE = "tests/models/test_file_checks.py::test_check_torch_file_refuses_other_names_in_pickles"
CONVOLUTION = "tests/kernels/test_winograd.py::test_winograd_agrees_with_torch"

RESUMED = (
    Fault(
        "random state not restored",
        STYLE_RUN,
        'torch.set_rng_state(checkpoint.tensors["rng.cpu"])',
        "pass",
        STATES,
    ),
    Fault(
        "running statistics not restored",
        STEP,
        "self.net.load_state_dict(model)",
        'self.net.load_state_dict({k: v for k, v in model.items() if "running_" not in k}, strict=False)',
        STATES,
    ),
    Fault(
        "gradient scaler not restored",
        STEP,
        "self.scaler.load_state_dict(scaler)",
        "pass",
        f"{EQUALS}[fp16-5-4]",
    ),
    Fault(
        "Adam's moments not restored",
        STEP,
        'torch.empty_like(parameter).copy_(value) if key != "step"',
        'torch.zeros_like(parameter) if key != "step"',
        f"{EQUALS}[fp32-5-4]",
    ),
    Fault(
        "counts of skipped steps not restored",
        STEP,
        "self.skipped_steps.restore(",
        "(lambda *_: None)(",
        f"{TRAINING}/test_old_formats.py::test_train_resume_continues_a_run[fp16]",
    ),
    Fault(
        "images one step back on resume",
        TRAINER,
        "start_step=done,\n",
        "start_step=done - 1 if done else 0,\n",
        f"{EQUALS}[fp32-4-2]",
    ),
    Fault(
        "all ranks read the same images",
        "fastnst/data/sampler.py",
        "step * self.batch_size + rank * size",
        "step * self.batch_size",
        "tests/data/test_sampler.py::test_sampler_ranks_split_the_batch_of_one_process",
    ),
    Fault(
        "steps of a style that is ahead made again",
        TRAINER,
        "for style in active if style.done < step]",
        "for style in active]",
        f"{TRAINING}/test_multi_style.py::test_train_styles_resumes_after_a_kill_between_two_saves",
    ),
    Fault(
        "changed configuration not refused",
        LAYOUT,
        "if differences and not allow_changes:",
        "if False:",
        f"{CHANGES}_lists_a_changed_configuration_key_by_key",
    ),
    Fault(
        "changed files not found",
        RESUME,
        "if then != today:",
        "if False:",
        f"{CHANGES}_names_refuses_and_allows_changes[exchange_vgg]",
    ),
    Fault(
        "another network allowed",
        RESUME,
        'refuse_another_network(checkpoint.path, configuration, now["configuration"])',
        "pass",
        f'{CHANGES}_never_allows_another_network[True-model.norm=batch-model.norm was "instance", is now "batch"]',
    ),
    Fault(
        "old names in checkpoints not read",
        RESUME,
        "configuration = current_keys(configuration)",
        "pass",
        f"{TRAINING}/test_old_formats.py::test_train_resume_continues_a_run[fp32]",
    ),
    Fault(
        "image that failed shifts all others on resume",
        INPUTS,
        "manifest = with_failed(manifest, late)",
        "pass",
        f"{TRAINING}/test_old_formats.py::test_train_resume_continues_a_run[fp32]",
    ),
)

LOGGED = (
    Fault(
        "steps behind the checkpoint stay in TensorBoard",
        LOG,
        "purge_step = start_step + 1 if start_step else 0",
        "purge_step = 0",
        f"{EQUALS}[fp32-4-2]",
    ),
    Fault(
        "steps behind the checkpoint stay in metrics.jsonl",
        LOG,
        'row["step"] <= step]',
        'row["step"] <= step + 9]',
        f"{EQUALS}[fp32-4-2]",
    ),
    Fault(
        "checkpoint saved before its log",
        STYLE_RUN,
        "run_log.flush()\n        self._save_checkpoint(step)\n",
        "self._save_checkpoint(step)\n        run_log.flush()\n",
        f"{TRAINING}/test_resume.py::test_train_stopped_by_a_signal_saves_log_checkpoint_and_style_model",
    ),
)

DURABLE = (
    Fault("content not synced", STORAGE, "sync_descriptor(file.fileno(), path)", "pass", WRITE),
    Fault(
        "name not synced",
        STORAGE,
        "        sync_folder(path.parent)\n    except OSError",
        "    except OSError",
        WRITE,
    ),
    Fault(
        "content copied instead of renamed",
        STORAGE,
        "            _replace(temporary, path)\n        elif",
        "            path.write_bytes(temporary.read_bytes())\n        elif",
        f"{TRAINING}/test_io_faults.py::test_write_atomic_where_any_call_fails",
    ),
    Fault(
        "run directory not locked",
        "fastnst/storage/locks.py",
        "    try:\n        lock.acquire()",
        "    try:\n        pass",
        "tests/storage/test_storage.py::test_lock_run_refuses_a_second_process_until_the_first_ends",
    ),
    Fault(
        "run directory not validated again under its lock",
        TRAIN,
        "            changes = check_run_dirs()\n",
        "            changes: list[list[str]] = [[] for _ in runs]\n",
        f"{TRAINING}/test_resume.py::test_train_does_not_restart_a_run_that_another_process_finished_meanwhile",
    ),
    Fault(
        "manifest written first",
        CHECKPOINT,
        "contents[MANIFEST] = _json_bytes(",
        "contents = {MANIFEST: b'', **contents}\n    contents[MANIFEST] = _json_bytes(",
        ORDER,
    ),
    Fault(
        "checkpoint copied instead of renamed",
        CHECKPOINT,
        "        _rename_into_place(part, path)\n",
        "        shutil.copytree(part, path, dirs_exist_ok=True)\n",
        ORDER,
    ),
    Fault(
        "old checkpoints removed before the new name is synced",
        CHECKPOINT,
        "_rename_into_place(part, path)\n        sync_folder(folder)\n",
        "_rename_into_place(part, path)\n        remove_old_checkpoints(run, step, keep=1)\n",
        ORDER,
    ),
    Fault(
        "checkpoint that was moved aside not restored",
        CHECKPOINT,
        "_restore_moved_aside(folder)\n    candidates",
        "candidates",
        f"{TRAINING}/test_io_faults.py::test_latest_checkpoint_restores_one_that_was_moved_aside",
    ),
    Fault(
        "SHA-256 of checkpoints not checked",
        CHECKPOINT,
        "if hashlib.sha256(data).hexdigest() != sha256:",
        "if False:",
        f"{TRAINING}/test_checkpoint.py::test_load_checkpoint_finds_damage_of_any_byte[state.safetensors]",
    ),
    Fault(
        "damage of a manifest not found",
        CHECKPOINT,
        'if data != _json_bytes({"format": FORMAT, "step": step, "files": entries}):',
        "if False:",
        f"{TRAINING}/test_checkpoint.py::test_load_checkpoint_finds_damage_of_every_byte_of_a_manifest",
    ),
    Fault(
        "run of damaged checkpoints begun again",
        RESUME,
        "if checkpoint is None and (steps := checkpoint_steps(run)):",
        "if checkpoint is None and (steps := checkpoint_steps(run)) and not steps:",
        f"{TRAINING}/test_resume.py::test_train_resume_does_not_restart_when_all_checkpoints_are_damaged",
    ),
    Fault(
        "step under way not saved at a signal",
        TRAINER,
        "is_final = step == last or bool(signum)",
        "is_final = step == last",
        f"{TRAINING}/test_resume.py::test_train_stopped_by_a_signal_saves_log_checkpoint_and_style_model",
    ),
    Fault(
        "second signal does not force the end",
        SIGNALS,
        "if self._deferred and self.signum is None:",
        "if self._deferred:",
        f"{TRAINING}/test_signals.py::test_deferred_keeps_the_first_signal_and_raises_the_second[15]",
    ),
)

SECURE = (
    Fault(
        "manifest may name other files",
        CHECKPOINT,
        "if set(files) != {TENSORS, STATE}:",
        "if not {TENSORS, STATE} <= set(files):",
        f"{TRAINING}/test_checkpoint.py::test_load_checkpoint_reads_no_other_file_that_a_manifest_names[False-../secret]",
    ),
    Fault(
        "links in a run directory followed",
        LOG,
        "flags | os.O_NOFOLLOW | os.O_CLOEXEC",
        "flags | os.O_CLOEXEC",
        "tests/security/test_runs.py::test_train_creates_nothing_through_a_dangling_link[metrics.jsonl]",
    ),
    Fault(
        "pickles of any kind loaded",
        WEIGHTS,
        "weights_only=True",
        "weights_only=False",
        "tests/security/test_network.py::test_load_vgg19_runs_no_payload_even_without_vetting",
    ),
    Fault(
        "SHA-256 of cached weights not checked",
        WEIGHTS,
        "if digest == source.sha256:",
        "if digest:",
        "tests/security/test_network.py::test_load_vgg19_checks_cached_weights_at_every_load",
    ),
    Fault(
        "SHA-256 of downloaded weights not checked",
        "fastnst/models/files/download.py",
        "if (found := sha256_of(part)) == source.sha256:",
        "if found := sha256_of(part):",
        "tests/models/test_download.py::test_download_refuses_wrong_bytes",
    ),
    Fault(
        "names in pickles not checked",
        FILE_CHECKS,
        "not _NAMES.fullmatch(str(argument))",
        "False",
        PICKLE,
    ),
    Fault(
        "compressed records accepted",
        FILE_CHECKS,
        "if method or packed != length:",
        "if False:",
        "tests/models/test_file_checks.py::test_check_torch_file_refuses_compressed_record",
    ),
)

NUMBERS = (
    Fault(
        "state not checked before it is saved",
        DIVERGENCE,
        "if not bool(torch.isfinite(tensor).all()):",
        "if False:",
        f"{TRAINING}/test_divergence.py::test_train_does_not_save_what_goes_wrong_after_the_check_of_a_step[second_moment]",
    ),
    Fault(
        "gradients not checked",
        STEP,
        "*gradients.values(), *self._state",
        "*map(torch.zeros_like, gradients.values()), *self._state",
        f"{TRAINING}/test_divergence.py::test_finite_check_read_late_names_the_step_and_the_value",
    ),
    Fault(
        "any number of skipped steps accepted",
        DIVERGENCE,
        "if in_a_row >= limit:",
        "if False:",
        f"{TRAINING}/test_divergence.py::test_train_fp16_stops_after_too_many_skipped_steps_in_a_row",
    ),
    Fault(
        "deterministic algorithms not asked for",
        DETERMINISM,
        "    torch.use_deterministic_algorithms(deterministic)\n",
        "",
        f"{TRAINING}/test_determinism.py::test_algorithms_are_deterministic_only_if_asked_for[True]",
    ),
    Fault(
        "loss terms that the next replay overwrites",
        GRAPHED,
        "self._packed.clone().unbind()",
        "self._packed.unbind()",
        f"{TRAINING}/test_graphed_step.py::test_graphed_step_equals_launched_steps",
    ),
    Fault(
        "batch not copied to where the graph reads it",
        GRAPHED,
        "        self._streams.copy(self.images, batch)\n",
        "",
        f"{TRAINING}/test_graphed_step.py::test_graphed_step_equals_launched_steps",
    ),
    Fault(
        "filters not flipped in the backward convolution",
        WINOGRAD,
        "g = g.flip(1) if backward else g",
        "g = g.flip(0).flip(0) if backward else g",
        "tests/kernels/test_winograd.py::test_convolve_one_pixel_gives_the_flipped_kernel",
    ),
    Fault(
        "weight's gradient without the sum over bands",
        WINOGRAD,
        "du.baddbmm_(",
        "du.zero_().baddbmm_(",
        CONVOLUTION,
    ),
)

FAULTS = (*RESUMED, *LOGGED, *DURABLE, *SECURE, *NUMBERS)
