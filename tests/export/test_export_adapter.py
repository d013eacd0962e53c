"""The adapter package: exactly the promised files, unchanged weights, refused when it does not answer as the trained model."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_dir import make_run

from conftest import RunMaker
from finetuneflow.errors import ExportError, ModelError, StorageError
from finetuneflow.export import adapter, bundle, export
from finetuneflow.workspace import directory_lock, write_json

REFERENCE_FILES = {
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "training_config.json", "metrics.json", "report.md", "train_loss.png", "finetuneflow_export.zip",
}  # fmt: skip
OURS = {"README.md", "manifest.json", "SHA256SUMS"}


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 17, 99, 40, 7, 301]])).logits


def test_the_package_is_exactly_the_reference_files_and_ours(new_run: RunMaker) -> None:
    result = export(new_run("lora"))
    on_disk = {path.name for path in result.dir.iterdir()}
    assert on_disk == REFERENCE_FILES | OURS == {file.name for file in result.files}
    assert result.dir.name == "adapter" and result.check.passed and result.check.max_abs_diff == 0.0


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prefix", "qlora"])
def test_the_exported_adapter_gives_the_trained_logits_through_peft_alone(new_run: RunMaker, kind: str) -> None:
    """Independent of our loaders: transformers and PEFT, as the card tells users to do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_dir = new_run(kind)
    exported = export(run_dir).dir
    base = yaml.safe_load((run_dir / "run.yaml").read_text())["model"]["base"]

    def load(folder: Path) -> Any:
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(fresh, folder).eval()

    assert torch.equal(logits_of(load(exported)), logits_of(load(run_dir / "adapter")))
    assert not torch.allclose(logits_of(load(exported)), logits_of(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_the_exported_tokenizer_renders_as_the_run_did(new_run: RunMaker) -> None:
    from transformers import AutoTokenizer

    run_dir = new_run("lora")
    write_json(run_dir / "template.json", {"name": "other", "source": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
                                                                      "{% if add_generation_prompt %}[assistant] {% endif %}"})  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(export(run_dir).dir)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "[user] Hi<|im_end|>"


def test_checksums_manifest_and_result_agree_with_the_bytes(new_run: RunMaker) -> None:
    result = export(new_run("lora"))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in result.dir.iterdir()}
    assert {file.name: file.sha256 for file in result.files} == hashes
    listed = dict(reversed(line.split("  ")) for line in (result.dir / "SHA256SUMS").read_text().splitlines())
    assert listed == {name: value for name, value in hashes.items() if name not in ("SHA256SUMS", "finetuneflow_export.zip")}
    manifest = json.loads((result.dir / "manifest.json").read_text())
    assert all(hashes[file["name"]] == file["sha256"] for file in manifest["files"]) and manifest["check"]["passed"]


def test_files_can_be_read_by_others(new_run: RunMaker) -> None:
    """safetensors writes 0600: another user or container could not load the export."""
    run_dir = new_run("lora")
    os.chmod(run_dir / "adapter/adapter_model.safetensors", 0o600)
    folder = export(run_dir).dir
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_the_archive_is_flat_complete_and_the_same_each_time(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    first, second = export(run_dir, "zip", name="a"), export(run_dir, "zip", name="b")
    assert [file.name for file in first.files] == ["finetuneflow_export.zip"]
    assert first.files[0].sha256 == second.files[0].sha256
    with zipfile.ZipFile(first.dir / "finetuneflow_export.zip") as archive:
        assert set(archive.namelist()) == (REFERENCE_FILES | OURS) - {"finetuneflow_export.zip"}
        for info in archive.infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert "/" not in info.filename and "\\" not in info.filename and not stat.S_ISLNK(info.external_attr >> 16)
        weights = archive.read("adapter_model.safetensors")
    assert weights == (run_dir / "adapter/adapter_model.safetensors").read_bytes()


# --- refused ---------------------------------------------------------------------------------------------


def leftovers(run_dir: Path) -> list[str]:
    folder = run_dir / "exports"
    return [path.name for path in folder.iterdir() if path.name != "lock"] if folder.exists() else []


def damage_copied_weights(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the staged weights right after they were copied, before they are checked."""
    from safetensors.torch import load_file, save_file

    real = adapter.copy_tokenizer

    def copy_and_damage(record: Any, stage: Path) -> None:
        real(record, stage)
        weights = load_file(stage / "adapter_model.safetensors")
        change(weights)
        save_file(weights, stage / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(adapter, "copy_tokenizer", copy_and_damage)


@pytest.mark.parametrize("what", ["one matrix zeroed", "slightly off", "not finite"])
def test_weights_damaged_on_the_way_are_refused_with_numbers_and_nothing_stays(
    new_run: RunMaker, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def change(weights: dict[str, Any]) -> None:
        name = sorted(weights)[0]
        if what == "one matrix zeroed":
            weights[name].zero_()
        elif what == "slightly off":
            weights[name].mul_(1.01)
        else:
            weights[name][0, 0] = float("nan")

    damage_copied_weights(monkeypatch, change)
    run_dir = new_run("lora")
    with pytest.raises(ExportError) as caught:
        export(run_dir)
    assert caught.value.code == "EXPORT_CHECK_FAILED"
    assert "passed" in caught.value.context and "max_abs_diff" in caught.value.context
    assert leftovers(run_dir) == []


def test_a_truncated_copy_is_refused(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.copy_tokenizer

    def copy_and_truncate(record: Any, stage: Path) -> None:
        real(record, stage)
        os.truncate(stage / "adapter_model.safetensors", 2000)

    monkeypatch.setattr(adapter, "copy_tokenizer", copy_and_truncate)
    run_dir = new_run("lora")
    with pytest.raises(ModelError):
        export(run_dir)
    assert leftovers(run_dir) == []


def test_another_tokenizer_than_the_trained_one_is_refused(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.tiny import tiny_tokenizer

    real = adapter.copy_tokenizer

    def copy_other(record: Any, stage: Path) -> None:
        real(record, stage)
        tiny_tokenizer(400).save_pretrained(stage)

    monkeypatch.setattr(adapter, "copy_tokenizer", copy_other)
    with pytest.raises(ExportError, match="token ids"):
        export(new_run("lora"))


def test_full_fine_tuning_has_no_adapter_and_says_so(new_run: RunMaker) -> None:
    run_dir = new_run("full")
    with pytest.raises(ExportError) as caught:
        export(run_dir, "adapter")
    assert caught.value.code == "EXPORT_UNSUPPORTED" and "--to merged" in (caught.value.remedy or "")
    assert leftovers(run_dir) == []


def test_a_pickled_adapter_is_never_exported(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    (run_dir / "adapter/adapter_model.safetensors").rename(run_dir / "adapter/adapter_model.bin")
    with pytest.raises(ExportError) as caught:
        export(run_dir)
    assert caught.value.code == "EXPORT_NO_WEIGHTS"


def test_a_base_that_changed_since_training_is_refused(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    environment = json.loads((run_dir / "environment.json").read_text())
    write_json(run_dir / "environment.json", {**environment, "fingerprint": {"base model": "0" * 64}})
    with pytest.raises(ExportError) as caught:
        export(run_dir)
    assert caught.value.code == "EXPORT_BASE_CHANGED" and leftovers(run_dir) == []


def test_what_is_no_run_or_not_finished_is_told_apart(tmp_path: Path, new_run: RunMaker) -> None:
    with pytest.raises(ExportError) as caught:
        export(tmp_path)
    assert caught.value.code == "EXPORT_NO_RUN"
    run_dir = new_run("lora")
    for path in (run_dir / "adapter").iterdir():
        path.unlink()
    with pytest.raises(ExportError) as caught:
        export(run_dir)
    assert caught.value.code == "EXPORT_NO_WEIGHTS" and "resume" in (caught.value.remedy or "")


def test_a_run_that_is_still_worked_on_is_not_exported(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    with directory_lock(run_dir), pytest.raises(StorageError) as caught:
        export(run_dir)
    assert caught.value.code == "RUN_BUSY"


# --- never lost, never overwritten ---------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    folder = export(run_dir).dir
    (folder / "README.md").write_text("mine")
    with pytest.raises(StorageError) as caught:
        export(run_dir)
    assert caught.value.code == "STORAGE_EXISTS" and (folder / "README.md").read_text() == "mine"
    export(run_dir, overwrite=True)
    assert (folder / "README.md").read_text() != "mine" and leftovers(run_dir) == ["adapter"]


@pytest.mark.parametrize("step", ["card", "move"])
def test_an_interrupted_export_leaves_the_old_one_intact(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    run_dir = new_run("lora")
    before = {file.name: file.sha256 for file in export(run_dir).files}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if step == "card":
        monkeypatch.setattr("finetuneflow.export.package.card_text", interrupt)
    else:
        monkeypatch.setattr(bundle, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run_dir, overwrite=True)
    assert leftovers(run_dir) == ["adapter"]
    assert {file.name: file.sha256 for file in bundle.list_files(run_dir / "exports/adapter")} == before


def test_a_kill_between_the_two_renames_is_mended_by_the_next_export(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    folder = export(run_dir).dir
    folder.rename(folder.with_name(".adapter.old-abc"))
    (run_dir / "exports/.adapter.partial-xyz").mkdir()
    with pytest.raises(StorageError) as caught:
        export(run_dir)
    assert caught.value.code == "STORAGE_EXISTS"
    assert leftovers(run_dir) == ["adapter"] and (folder / "adapter_model.safetensors").is_file()


def test_too_little_space_is_told_before_anything_is_written(new_run: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuneflow.workspace.free_bytes", lambda path: 1000)
    run_dir = new_run("lora")
    for target in ("adapter", "merged"):
        with pytest.raises(StorageError) as caught:
            export(run_dir, target)  # type: ignore[arg-type]
        assert caught.value.code == "STORAGE_DISK_FULL" and caught.value.context["needed_bytes"] > 1000
    assert leftovers(run_dir) == []


@pytest.mark.parametrize("target", ["adapter", "merged"])
def test_a_disk_that_fills_up_while_writing_is_told_as_such(new_run: RunMaker, target: str) -> None:
    """A file size limit stands in for a full disk: writes of Python and of the safetensors library fail alike."""
    run_dir = new_run("lora")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            export(run_dir, target)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "STORAGE_DISK_FULL" and leftovers(run_dir) == []


@pytest.mark.parametrize(
    "name", ["../out", "/abs", "a/b", "", ".hidden", "-rf", "con", "lock", "a\0b", "x" * 200, "nom été", "a;rm -rf"]
)
def test_a_name_that_could_leave_the_folder_is_refused(new_run: RunMaker, name: str) -> None:
    run_dir = new_run("lora")
    with pytest.raises(StorageError) as caught:
        export(run_dir, name=name or ".")
    assert caught.value.code == "STORAGE_BAD_NAME" and leftovers(run_dir) == []


def test_a_link_is_never_packed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.txt").symlink_to(secret)
    with pytest.raises(ExportError) as caught:
        bundle.write_archive(package, package / "x.zip")
    assert caught.value.code == "EXPORT_BAD_MEMBER"


@pytest.mark.parametrize("name", ["a b", "-x", ".hidden", "a\nb", "ü", "a..b", "x" * 200])
def test_a_member_with_an_odd_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ExportError):
        bundle.member_paths(tmp_path)


# --- secrets -------------------------------------------------------------------------------------------------


def test_planted_secrets_are_in_no_file_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a variable, in the settings, in environment, metrics and samples: shapes known and unknown."""
    shaped, unshaped = "hf_AbCdEfGhIjKlMnOpQrStUv", "correct-horse-battery-staple"
    monkeypatch.setenv("MY_SERVICE_API_KEY", unshaped)
    run_dir = make_run(
        tmp_path, data__train=[f"https://user:pa55word@host/x.jsonl?token={shaped}", f"s3://{unshaped}/data.jsonl"]
    )
    write_json(run_dir / "metrics.json", {"eval_loss": 1.0, "note": f"Bearer {unshaped}", "api_key": "zzzzqqqq1"})
    write_json(run_dir / "environment.json", {"setup": {"threads": 1, "password": "zzzzqqqq2"}, "env": {"HF_TOKEN": shaped}})
    write_json(
        run_dir / "data/manifest.json",
        {"train": [{"file": f"/home/{shaped}/t.jsonl?token={unshaped}", "sha256": "ab", "rows": 1}]},
    )
    write_json(
        run_dir / "evals/final.json",
        {"samples": [{"instruction": shaped, "expected_output": unshaped, "model_output": f"key {shaped}"}]},
    )
    folder = export(run_dir).dir
    with zipfile.ZipFile(folder / "finetuneflow_export.zip") as archive:
        contents = {f"zip:{name}": archive.read(name) for name in archive.namelist()}
    contents |= {path.name: path.read_bytes() for path in folder.iterdir()}
    for secret in (shaped, unshaped, "pa55word", "zzzzqqqq1", "zzzzqqqq2"):
        assert [name for name, data in contents.items() if secret.encode() in data] == []
    settings = json.loads((folder / "training_config.json").read_text())
    assert settings["evaluation"]["max_new_tokens"] == 128 and settings["method"]["num_virtual_tokens"] == 20
