"""Loading from the hub: the real client against a stand-in server that can misbehave in every known way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_standin import TOKEN, HubStandin, Loader, Repo
from tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStandin, Loader]]:
    hub = HubStandin()
    hub.start()
    loader = Loader(hub.url, tmp_path_factory.mktemp("hf_home"))
    yield hub, loader
    loader.close()
    hub.stop()


@pytest.fixture
def hub(service: tuple[HubStandin, Loader]) -> Iterator[HubStandin]:
    yield service[0]
    service[0].reset()


@pytest.fixture
def loader(service: tuple[HubStandin, Loader]) -> Loader:
    return service[1]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "repo"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_hub_model_loads_at_a_recorded_commit_with_its_very_weights(hub: HubStandin, loader: Loader, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"never fetched")
    repo = hub.repos["acme/plain"] = Repo(folder)
    got = loader.load("acme/plain")
    assert got["facts"]["commit"] == repo.commit
    assert got["facts"]["architecture"] == "LlamaForCausalLM"
    expected = sum(p.double().sum().item() for p in tiny_model("llama").parameters())
    assert got["weights"] == pytest.approx(expected, abs=1e-9)
    fetched = {r.path.rsplit("/", 1)[-1] for r in hub.requests if "/resolve/" in r.path}
    assert "model.safetensors" in fetched and "pytorch_model.bin" not in fetched
    assert not any("onnx" in r.path for r in hub.requests)


def test_a_revision_is_honoured_and_an_unknown_one_is_named(hub: HubStandin, loader: Loader, folder: Path) -> None:
    repo = hub.repos["acme/revised"] = Repo(folder)
    assert loader.load("acme/revised", revision=repo.commit)["facts"]["commit"] == repo.commit
    got = loader.load("acme/revised", revision="v9")
    assert got["code"] == "MODEL_NOT_FOUND"
    assert "'v9'" in got["message"]


def test_a_cached_model_loads_while_the_hub_is_unreachable(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/cached"] = Repo(folder)
    online = loader.load("acme/cached")
    with hub.unreachable():
        offline = loader.load("acme/cached")
        unknown = loader.load("acme/never-seen")
    assert offline["facts"] == online["facts"]
    assert any("cached copy" in note for note in offline["notes"])
    assert unknown["code"] == "MODEL_OFFLINE"
    assert "starter" in unknown["remedy"]


def test_a_hub_in_trouble_is_not_reported_as_a_missing_model(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/trouble"] = Repo(folder)
    hub.status_for["/api/models/acme/trouble"] = 503
    assert loader.load("acme/trouble")["code"] == "MODEL_OFFLINE"


def test_the_rate_limit_has_its_own_message_and_a_cached_model_is_used(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/limited"] = Repo(folder)
    hub.status_for["/api/models/acme/limited"] = 429
    got = loader.load("acme/limited")
    assert got["code"] == "MODEL_RATE_LIMITED"
    assert "hf auth login" in got["remedy"]
    hub.reset()
    assert "facts" in loader.load("acme/limited")
    hub.status_for["/api/models/acme/limited"] = 429
    assert any("limits the rate" in note for note in loader.load("acme/limited")["notes"])


def test_a_gated_model_says_where_to_accept_and_how_to_sign_in(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/gated"] = Repo(folder, gated=True)
    got = loader.load("acme/gated")
    assert got["code"] == "MODEL_ACCESS_DENIED"
    assert f"{hub.url}/acme/gated" in got["remedy"]
    assert "hf auth login" in got["remedy"] and "HF_TOKEN" in got["remedy"]
    assert "No token is set" in got["message"]


def test_a_token_opens_a_gated_model_and_never_shows_in_a_message(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/gated2"] = Repo(folder, gated=True)
    wrong = "hf_wrongsecret9876543210"
    refused = loader.load("acme/gated2", token=wrong)
    assert refused["code"] == "MODEL_ACCESS_DENIED"
    assert "does not open" in refused["message"]
    assert wrong not in json.dumps(refused)
    granted = loader.load("acme/gated2", token=TOKEN)
    assert "facts" in granted
    assert TOKEN not in json.dumps(granted)


def test_an_unknown_name_gets_the_nearest_ones(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/story-model"] = Repo(folder)
    got = loader.load("acme/story-modle")
    assert got["code"] == "MODEL_NOT_FOUND"
    assert "acme/story-model" in got["remedy"]
    assert "private" in got["remedy"]


def test_a_repository_with_pickles_only_is_refused_before_anything_large_is_fetched(
    hub: HubStandin, loader: Loader, folder: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.repos["acme/pickles"] = Repo(folder)
    got = loader.load("acme/pickles")
    assert got["code"] == "MODEL_NO_SAFETENSORS"
    assert "save_pretrained" in got["remedy"]
    assert not hub.downloads_of("pytorch_model.bin")


def test_code_in_the_repository_is_refused_before_the_weights_are_fetched(hub: HubStandin, loader: Loader, folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    repo = hub.repos["acme/code"] = Repo(folder)
    got = loader.load("acme/code")
    assert got["code"] == "MODEL_REMOTE_CODE"
    assert repo.commit in got["remedy"]
    assert not hub.downloads_of("model.safetensors")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "acme_own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    marker = "own code ran"
"""


def test_consent_holds_for_one_commit_only(hub: HubStandin, loader: Loader, folder: Path) -> None:
    (folder / "modeling.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnModel"}
    edit_json(folder / "config.json", model_type="acme_own", architectures=["OwnModel"], auto_map=auto_map)
    repo = hub.repos["acme/own"] = Repo(folder)
    agreed = repo.commit
    assert loader.load("acme/own")["code"] == "MODEL_REMOTE_CODE"
    assert loader.load("acme/own", consent=agreed)["marker"] == "own code ran"
    (folder / "modeling.py").write_text(OWN_CODE + "# changed after the consent\n")
    stale = loader.load("acme/own", consent=agreed)
    assert stale["code"] == "MODEL_REMOTE_CODE"
    assert "another revision" in stale["message"]


def test_a_known_architecture_runs_the_library_code_even_with_consent(hub: HubStandin, loader: Loader, folder: Path) -> None:
    (folder / "modeling.py").write_text(OWN_CODE)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.OwnModel"})
    repo = hub.repos["acme/known"] = Repo(folder)
    got = loader.load("acme/known", consent=repo.commit)
    assert got["facts"]["architecture"] == "LlamaForCausalLM" and got["marker"] is None


def test_a_connection_cut_in_the_middle_of_a_file_continues_where_it_stopped(
    hub: HubStandin, loader: Loader, folder: Path
) -> None:
    hub.repos["acme/cut"] = Repo(folder)
    hub.cut_after, hub.cuts_left = {"model.safetensors": 100_000}, 1
    assert "facts" in loader.load("acme/cut")
    ranges = [r.range for r in hub.downloads_of("model.safetensors")]
    assert len(ranges) == 2 and ranges[0] is None
    assert ranges[1] is not None and 0 < int(ranges[1].removeprefix("bytes=").rstrip("-").split("-")[0]) <= 100_000


def test_after_a_failed_download_only_the_missing_files_are_fetched(hub: HubStandin, loader: Loader, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sharded")
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) >= 2
    hub.repos["acme/sharded"] = Repo(folder)
    hub.status_for[shards[-1]] = 404
    assert loader.load("acme/sharded")["code"] in ("MODEL_NOT_FOUND", "MODEL_OFFLINE")
    assert hub.downloads_of(shards[0])
    hub.reset()
    assert "facts" in loader.load("acme/sharded")
    assert hub.downloads_of(shards[-1]) and not hub.downloads_of(shards[0])


def test_an_unfinished_download_is_not_taken_for_a_model_offline(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/half"] = Repo(folder)
    hub.status_for["model.safetensors"] = 403
    assert loader.load("acme/half")["code"] == "MODEL_ACCESS_DENIED"
    with hub.unreachable():
        assert loader.load("acme/half")["code"] == "MODEL_OFFLINE"


def test_weights_that_arrive_damaged_are_refused(hub: HubStandin, loader: Loader, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
    hub.repos["acme/lying"] = Repo(folder)
    assert loader.load("acme/lying")["code"] == "MODEL_CORRUPT"


def test_an_interrupted_update_leaves_the_older_whole_copy_in_use(hub: HubStandin, loader: Loader, folder: Path) -> None:
    repo = hub.repos["acme/updated"] = Repo(folder)
    old = loader.load("acme/updated")["facts"]
    tiny_model("llama", seed=5).save_pretrained(folder)
    assert repo.commit != old["commit"]
    hub.status_for["model.safetensors"] = 403
    assert "code" in loader.load("acme/updated")
    with hub.unreachable():
        assert loader.load("acme/updated")["facts"] == old


def test_a_model_larger_than_the_free_disk_is_refused_before_it_is_fetched(hub: HubStandin, loader: Loader, folder: Path) -> None:
    hub.repos["acme/huge"] = Repo(folder)
    hub.claimed_sizes["model.safetensors"] = 10**16
    got = loader.load("acme/huge")
    assert got["code"] == "STORAGE_DISK_FULL"
    assert got["context"]["needed_bytes"] == 10**16
    assert not hub.downloads_of("model.safetensors")


def test_an_adapter_on_the_hub_is_not_taken_for_a_base(hub: HubStandin, loader: Loader, folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    hub.repos["acme/adapter"] = Repo(folder)
    assert loader.load("acme/adapter")["code"] == "MODEL_IS_ADAPTER"
