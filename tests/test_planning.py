"""What planning gathers before a run, from hostile files, servers and machines."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from export.run_dir import make_run
from finetuneflow import planning
from finetuneflow.config import Data, build_config, dump_config
from finetuneflow.data.examples import Example, to_examples
from finetuneflow.data.forms import Form
from finetuneflow.data.prepare import Recipe, prepare
from finetuneflow.data.quality import inspect_files
from finetuneflow.data.sources import read_rows
from finetuneflow.data.templates import resolve_template
from finetuneflow.errors import DataError, FineTuneFlowError, ModelError
from finetuneflow.hardware import Cpu, Gpu, Hardware, Memory, Torch
from finetuneflow.knowledge import facts
from finetuneflow.knowledge.values import DataFacts, Machine
from finetuneflow.planning import base_model, sample
from finetuneflow.workspace import Workspace, write_json
from models.hub_standin import HubStandin, Repo
from models.tiny import CHATML, save_tiny, tiny_config, tiny_tokenizer

GIB = 2**30


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read whole on the slowest machine."""
    monkeypatch.setattr(sample, "SAMPLE_SECONDS", 600.0)


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    words = ["river", "stone", "cloud", "table", "paper", "light", "window", "garden", "bread", "music", "winter", "morning"]
    return [
        {
            "instruction": f"Tell me of the {words[n % 12]} and the {words[n // 12 % 12]}, number {n} of {n * n}.",
            "output": " ".join(f"{words[(n * k + k * k) % 12]}{n * k}" for k in range(1, 4 + n % 9)),
        }
        for n in range(start, start + count)
    ]


def jsonl(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def looked_at(*train: Path, tokenizer: Any = None, supervise: str | None = None, **settings: Any) -> DataFacts:
    data = Data(train=[str(path) for path in train], **settings)
    found, _ = planning.look_at_data(data, tokenizer, supervise=supervise)
    assert found is not None
    return found


# --- base model ---------------------------------------------------------------------------------------


def config_of(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**tiny_config(architecture).to_dict(), **changes}


def model_folder(path: Path, config: Any, **files: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    for name, content in files.items():
        write_json(path / f"{name}.json", content)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, an empty cache and no hub."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "XDG_CACHE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def test_the_starter_is_found_with_its_facts(nowhere: Path) -> None:
    found = planning.look_at_model("starter", network=False)
    assert found.folder is not None and found.shape.certainty == "exact" and found.notes == ()
    weights = found.folder / "model.safetensors"
    header = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    stored = sum(int.__mul__(*(*entry["shape"], 1)[:2]) for name, entry in header.items() if name != "__metadata__")
    assert found.shape.num_parameters == stored
    assert found.facts.chat_template and found.facts.eos_token == "<|im_end|>"


def test_a_folder_is_read(nowhere: Path) -> None:
    template = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHATML}]
    tokenizer = {"chat_template": template, "pad_token": {"content": "<pad>"}, "eos_token": "</s>"}
    folder = model_folder(nowhere / "base", config_of(torch_dtype="bfloat16", dtype=None), tokenizer_config=tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    found = planning.look_at_model(str(folder)).facts
    assert (found.chat_template, found.pad_token, found.eos_token) == (CHATML, "<pad>", "</s>")
    assert (found.licence, found.stored_dtype, found.model_type, found.max_position) == ("apache-2.0", "bfloat16", "llama", 512)
    (folder / "chat_template.jinja").write_text("{{ newer }}")
    assert planning.look_at_model(str(folder)).facts.chat_template == "{{ newer }}"


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000, "\udcff"])
def test_a_folder_without_a_readable_config_says_so(nowhere: Path, content: str) -> None:
    (nowhere / "base").mkdir()
    (nowhere / "base" / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError) as raised:
        planning.look_at_model("base")
    assert raised.value.code == "MODEL_NOT_FOUND" and raised.value.remedy


ODD_VALUES: list[Any] = [-1, 0, 2**70, 1e308, "12", "", None, True, [], {}, [[]], {"a": {}}, "x" * 100_000]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:12])
def test_hostile_configs_give_facts_of_the_right_kind_or_one_error(nowhere: Path, value: Any) -> None:
    for key in (*config_of(), "text_config", "quantization_config", "n_positions", "torch_dtype", "auto_map"):
        folder = model_folder(
            nowhere / "base", config_of(**{key: value}), tokenizer_config={"chat_template": value, "pad_token": value}
        )
        try:
            found = planning.look_at_model(str(folder)).facts
        except ModelError as error:
            assert error.code == "MODEL_UNSUPPORTED_ARCH"
            continue
        for text in (found.model_type, found.stored_dtype, found.quantized_as, found.chat_template, found.pad_token):
            assert text is None or isinstance(text, str)
        assert found.max_position is None or found.max_position > 0


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_hubs_cache_is_looked_into(nowhere: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(nowhere / "c"))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, ".")
    repository = nowhere / "c" / below / "models--acme--thing"
    commit = "0123456789abcdef0123456789abcdef01234567"
    model_folder(repository / "snapshots" / commit, config_of())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, commit):
        found = planning.look_at_model("acme/thing", revision=revision, network=False)
        assert found.folder == repository / "snapshots" / commit and found.shape.hidden == 48
    with pytest.raises(ModelError):
        planning.look_at_model("acme/thing", revision="v2", network=False)
    (repository / "refs" / "main").write_bytes(b"\xff\x00")
    with pytest.raises(ModelError):
        planning.look_at_model("acme/thing", network=False)


def test_sizes_and_known_names_need_no_files(nowhere: Path) -> None:
    by_size = planning.look_at_model("7B", network=False)
    assert by_size.shape.certainty == "typical" and "typical" in by_size.notes[0]
    known = planning.look_at_model("meta-llama/Llama-2-7b-hf", network=False)
    assert known.shape.num_parameters == 6_738_415_616 and known.facts.max_position == 4096  # arXiv:2307.09288
    guessed = planning.look_at_model("acme/tale-3b-chat", network=False)
    assert guessed.shape.num_parameters == pytest.approx(3e9, rel=0.05)
    assert "not asked" in guessed.notes[0] and "typical shape of 3B" in guessed.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b/c",
        "/no/where",
        "~nobody-of-that-name/x",
        "~",
        ".",
        "a\nb",
        "a\0b",
        "a b",
        "a/..",
        "a/../b",
        "\udcff",
        "x" * 5000,
        "http://127.0.0.1/x",
        "a?b",
        "a#b/c%2e%2e",
        "-x",
        "acme/\x1b[31m7B",
        "acme/tale\n7B",
    ],
)
def test_odd_names_are_no_models_and_reach_no_server(hub: Server, name: str) -> None:
    with pytest.raises(ModelError) as raised:
        planning.look_at_model(name)
    assert raised.value.code == "MODEL_NOT_FOUND" and "\x1b" not in str(raised.value) and len(str(raised.value)) < 12_000
    assert all("x" * 100 in path for path, _ in hub.requests)


def test_a_file_is_no_model(nowhere: Path) -> None:
    (nowhere / "model.gguf").write_text("GGUF")
    with pytest.raises(ModelError):
        planning.look_at_model("model.gguf")


# --- the hub ------------------------------------------------------------------------------------------


@dataclass
class Server:
    """Answers by path; everything else is 404. An answer is (status, headers, body) or a function that writes one."""

    url: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def model(self, config: Any, card: Any = None, name: str = "acme/thing") -> None:
        self.answers[f"/{name}/resolve/main/config.json"] = config
        if card is not None:
            self.answers[f"/api/models/{name}"] = card


@pytest.fixture
def hub(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
            answer = server.answers.get(self.path, (404, {}, b""))
            if callable(answer):
                answer(self)
                return
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret0123456789")
    (nowhere / "hf").mkdir()
    (nowhere / "hf" / "token").write_text("hf_secret0123456789")
    yield server
    server.ended.set()
    httpd.shutdown()
    httpd.server_close()
    assert not [headers for _, headers in server.requests if "authorization" in headers or "hf_secret" in str(headers)]


def test_the_hub_is_asked_for_config_and_card(hub: Server) -> None:
    hub.model(config_of(), {"gated": False, "cardData": {"license": "mit"}})
    found = planning.look_at_model("acme/thing")
    assert found.shape.hidden == 48 and (found.facts.licence, found.facts.gated) == ("mit", False)
    assert found.folder is None and "from the hub" in found.notes[0]


def test_the_repository_of_the_stand_in_is_read_and_a_gated_one_is_not(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin = HubStandin()
    folder = model_folder(nowhere / "source", config_of())
    standin.repos = {"acme/open": Repo(folder), "acme/shut-7b": Repo(folder, gated=True), "acme/shut": Repo(folder, gated=True)}
    standin.start()
    monkeypatch.setenv("HF_ENDPOINT", standin.url)
    try:
        assert planning.look_at_model("acme/open").shape.hidden == 48
        assert planning.look_at_model("acme/open", revision=standin.repos["acme/open"].commit).shape.hidden == 48
        assert planning.look_at_model("acme/shut-7b").shape.certainty == "typical"
        for name, revision in (("acme/shut", None), ("acme/none", None), ("acme/open", "v9"), ("acme/open", "../../x")):
            with pytest.raises(ModelError, match="the hub gave no config"):
                planning.look_at_model(name, revision=revision)
        with standin.unreachable(), pytest.raises(ModelError):
            planning.look_at_model("acme/open")
    finally:
        standin.stop()


def test_a_gated_model_says_so(hub: Server) -> None:
    for name in ("acme/thing", "acme/thing-7b"):
        hub.model((401, {}, b""), {"gated": "manual", "cardData": {"license": "llama2"}}, name=name)
    found = planning.look_at_model("acme/thing-7b")
    assert found.facts.gated and found.facts.licence == "llama2" and "gated" in found.notes[0]
    with pytest.raises(ModelError, match="gated"):
        planning.look_at_model("acme/thing")


HUGE = b'{"model_type": "' + b"x" * 50_000_000 + b'"}'
ANSWERS: dict[str, Any] = {
    "500": (500, {}, b"{}"),
    "wrong JSON": (200, {}, b"<html>no</html>"),
    "a list": [1, 2],
    "cut short": (200, {"Content-Length": "5000"}, b'{"model_type"'),
    "deep": (200, {}, b"[" * 900_000),
    "huge": (200, {}, HUGE),
    "no HTTP": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "hangs up": lambda handler: handler.connection.close(),
    "file": (302, {"Location": "file:///etc/passwd"}, b""),
    "ftp": (302, {"Location": "ftp://127.0.0.1/config.json"}, b""),
    "round and round": (302, {"Location": "/acme/thing/resolve/main/config.json"}, b""),
    "no place": (302, {"Location": "http://[/"}, b""),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_bad_answers_count_as_none(hub: Server, answer: Any) -> None:
    hub.model(answer, answer)
    with pytest.raises(ModelError) as raised:
        planning.look_at_model("acme/thing")
    assert raised.value.code == "MODEL_NOT_FOUND"


def test_a_redirect_on_the_web_is_followed_but_not_to_a_less_safe_place(hub: Server) -> None:
    hub.model((307, {"Location": "/elsewhere"}, b""))
    hub.answers["/elsewhere"] = config_of()
    assert planning.look_at_model("acme/thing").shape.hidden == 48
    request = base_model.urllib.request.Request("https://hub.example/config.json")
    redirects = base_model._WebRedirects()
    for place, followed in (("https://cdn.example/c", True), ("http://cdn.example/c", False), ("file:///etc/passwd", False)):
        assert (redirects.redirect_request(request, None, 302, "", {}, place) is not None) is followed  # type: ignore[arg-type]


@pytest.mark.parametrize("card", [[], {"cardData": []}, {"cardData": {"license": ["mit", 3]}, "gated": {}}, {"gated": [1]}])
def test_odd_cards_do_no_harm(hub: Server, card: Any) -> None:
    hub.model(config_of(), card)
    found = planning.look_at_model("acme/thing").facts
    assert found.licence is None and found.gated in (True, False, None)


def hangs(server: Server) -> Callable[[Any], None]:
    return lambda handler: server.ended.wait(30) and None


def drips(server: Server) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.ended.wait(0.05):
            handler.wfile.write(b" ")

    return answer


@pytest.mark.parametrize("slow", [hangs, drips])
def test_a_hub_that_hangs_or_drips_is_left_after_the_stated_time(
    hub: Server, monkeypatch: pytest.MonkeyPatch, slow: Callable[[Server], Any]
) -> None:
    monkeypatch.setattr(base_model, "HUB_SECONDS", 0.3)
    hub.model(slow(hub), slow(hub), name="acme/thing-7b")
    begin = time.monotonic()
    assert planning.look_at_model("acme/thing-7b").shape.certainty == "typical"
    assert time.monotonic() - begin < 10  # a hang would last 30 s, a drip for ever


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_an_offline_user_asks_nobody(hub: Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    hub.model(config_of())
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        planning.look_at_model("acme/thing")
    with pytest.raises(ModelError):
        planning.look_at_model("acme/thing", network=False)
    assert hub.requests == []


@pytest.mark.parametrize("endpoint", ["file:///etc", "", "http://", "http://[", "http://127.0.0.1:99999", "nonsense"])
def test_an_odd_endpoint_counts_as_no_hub(nowhere: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelError):
        planning.look_at_model("acme/thing")


# --- data ---------------------------------------------------------------------------------------------


def test_small_files_are_counted_exactly(tmp_path: Path) -> None:
    content: list[Any] = [*rows(40), rows(1)[0], {"nonsense": 1}, 7, {"instruction": "No answer", "output": ""}]
    files = [jsonl(tmp_path / "a.jsonl", content), tmp_path / "b.jsonl.gz"]
    files[1].write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(25, start=100)).encode()))
    reports = inspect_files(files)
    found = looked_at(*files, eval_fraction=0.0)
    assert found.examples == sum(report.examples for report in reports) == 66
    assert found.rejected == sum(report.rejected_rows for report in reports) == 3
    assert found.duplicate_share == pytest.approx(sum(report.duplicates for report in reports) / 66)
    assert (found.kinds, found.turns_mean, found.eval_overlap, found.counted) == (("chat",), 2, None, False)
    chars = [
        sum(len(message.content) for message in item.messages)
        for path in files
        for item in to_examples(read_rows(path))
        if isinstance(item, Example)
    ]
    estimated = sum(chars) / 66 / 4 + 2 * sample.TURN_TOKENS
    assert found.mean_tokens == pytest.approx(estimated, rel=0.02)
    assert len(found.length_percentiles) == 101 and found.length_percentiles[100] == pytest.approx(max(chars) / 4 + 10, abs=2)


def test_lengths_with_a_tokenizer_are_near_those_of_the_run(tmp_path: Path) -> None:
    from finetuneflow.data.tokens import Policy, measure

    tokenizer = tiny_tokenizer()
    template = resolve_template(tokenizer, "auto")
    path = jsonl(tmp_path / "a.jsonl", rows(120))
    [report] = inspect_files([path], measure=lambda batch: measure(batch, template, Policy()))
    found = looked_at(path, tokenizer=tokenizer.backend_tokenizer, eval_fraction=0.0)
    assert report.tokens is not None and found.counted
    assert found.mean_tokens == pytest.approx(report.tokens.total / 120, rel=0.1)
    assert found.supervised_share == pytest.approx(report.tokens.supervised_share, abs=0.05)
    assert found.length_percentiles[50] == pytest.approx(report.tokens.median, rel=0.1)


def test_what_enters_the_loss_follows_the_settings(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "word " * 40} for role in ("user", "assistant") * 3]
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000, "parameters": {}}}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 3)
    share = {kind: looked_at(path, supervise=kind, eval_fraction=0).supervised_share for kind in ("assistant", "last", "all")}
    assert share["all"] == 1
    assert share["last"] == pytest.approx(share["assistant"] / 3 if share["assistant"] else 0)
    silent = [*turns[:3], {**turns[3], "weight": 0}, *turns[4:]]
    assert looked_at(jsonl(path, [{"messages": silent}] * 3), eval_fraction=0).supervised_share == pytest.approx(
        2 / 3 * (share["assistant"] or 0)
    )
    assert (
        looked_at(path, eval_fraction=0).mean_tokens + 1000
        < looked_at(jsonl(path, [{"messages": turns, "tools": tools}] * 3), eval_fraction=0).mean_tokens
    )


def cut_after(monkeypatch: pytest.MonkeyPatch, first_rows: int = 500) -> None:
    """A reader whose time is up after so many rows, whatever machine the test runs on."""
    monkeypatch.setattr(sample, "SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr(sample, "SAMPLE_ROWS", first_rows)


def write_large(path: Path, kind: str) -> Path:
    content = rows(6_000)
    text = {
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in content),
        "indented": lambda: json.dumps(content, indent=4),
        "one line": lambda: json.dumps(content),
        "compact": lambda: json.dumps(content, separators=(",", ":")),
        "escaped": lambda: json.dumps([{**row, "output": "é" * 50 + row["output"]} for row in content]),
        "letters": lambda: json.dumps([{**row, "output": "é" * 50 + row["output"]} for row in content], ensure_ascii=False),
        "csv": lambda: "instruction,output\n" + "".join(f'"{row["instruction"]}\n",{row["output"]}\n' for row in content),
    }[kind.removesuffix(".gz").removesuffix(".zst")]()
    data = text.encode()
    if kind.endswith(".gz"):
        data = gzip.compress(data)
    if kind.endswith(".zst"):
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


LARGE = [
    "jsonl",
    "indented",
    "one line",
    "compact",
    "escaped",
    "letters",
    "csv",
    "jsonl.gz",
    "indented.gz",
    "one line.gz",
    "jsonl.zst",
]


@pytest.mark.parametrize("kind", LARGE)
def test_the_number_of_a_large_file_is_estimated_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_large(tmp_path / f"large.{'csv' if kind == 'csv' else 'json'}", kind)
    exact = looked_at(path, eval_fraction=0)
    assert exact.examples == 6_000
    cut_after(monkeypatch)
    found, notes = planning.look_at_data(Data(train=[str(path)], eval_fraction=0))
    assert found is not None and found.examples == pytest.approx(6_000, rel=0.1)
    assert found.mean_tokens == pytest.approx(exact.mean_tokens, rel=0.1)
    assert "500 examples read, 8 % of the files" in notes[-1] or "9 % of the files" in notes[-1]


def test_the_number_of_a_large_parquet_file_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(6_000)), tmp_path / "a.parquet")
    cut_after(monkeypatch)
    assert looked_at(tmp_path / "a.parquet", eval_fraction=0).examples == 6_000


def test_a_compressed_file_too_large_to_unpack_is_estimated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SIZE_SECONDS", 0.0)
    monkeypatch.setattr(sample, "BLOCK_BYTES", 200_000)
    cut_after(monkeypatch, first_rows=2_000)
    path = write_large(tmp_path / "large.json.gz", "jsonl.gz")
    assert looked_at(path, eval_fraction=0).examples == pytest.approx(6_000, rel=0.25)


def test_files_of_different_sizes_count_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = write_large(tmp_path / "large.json", "jsonl")
    small = jsonl(tmp_path / "small.jsonl", [{**row, "output": "word " * 4_000} for row in rows(60, start=9_000)])
    exact = looked_at(large, small, eval_fraction=0)
    cut_after(monkeypatch)
    found = looked_at(large, small, eval_fraction=0)
    assert found.examples == pytest.approx(exact.examples, rel=0.1)
    assert found.mean_tokens == pytest.approx(exact.mean_tokens, rel=0.25)


def test_the_limit_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = jsonl(tmp_path / "a.jsonl", [{"nonsense": 1}, *rows(30)])
    two = jsonl(tmp_path / "b.jsonl", [{"text": "word " * 5_000}] * 30)
    held = jsonl(tmp_path / "eval.jsonl", rows(50, start=500))
    found = looked_at(one, two, limit=20, eval=[str(held)])
    assert (found.examples, found.eval_examples, found.kinds, found.rejected) == (20, 20, ("chat",), 1)
    assert looked_at(one, two, limit=40, eval_fraction=0).kinds == ("chat", "text")
    large = write_large(tmp_path / "large.json", "jsonl")
    cut_after(monkeypatch)
    assert looked_at(large, limit=3_000, eval_fraction=0).examples == 3_000
    assert looked_at(large, limit=100, eval_fraction=0).examples == 100


def prepared_sizes(tmp_path: Path, path: Path, **settings: Any) -> tuple[int, int]:
    """What the run itself makes of the data."""
    tokenizer = tiny_tokenizer()
    recipe = Recipe(train=(str(path),), **{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    manifest = prepare(recipe, "t", resolve_template(tokenizer, "auto"), tmp_path / "cache", lambda *_, **__: None).manifest  # type: ignore[arg-type]
    return manifest["train_examples"], manifest["eval_examples"]


@pytest.mark.parametrize(("general", "share"), [(200, 0.25), (20, 0.5)])
def test_replayed_examples_count_as_the_run_counts_them(tmp_path: Path, general: int, share: float) -> None:
    own = jsonl(tmp_path / "a.jsonl", rows(100))
    replay = jsonl(tmp_path / "g.jsonl", [{"question": f"Who wrote book {n}?", "answer": "word " * 200} for n in range(general)])
    found, notes = planning.look_at_data(Data(train=[str(own)], replay=[str(replay)], replay_share=share))
    alone = looked_at(own)
    made = prepared_sizes(tmp_path, own, replay=[str(replay)], replay_share=share)
    assert found is not None and (found.examples, found.eval_examples) == made and made[0] == 90 + min(30, general)
    replayed = (found.examples - alone.examples) / found.examples
    assert found.mean_tokens == pytest.approx((1 - replayed) * alone.mean_tokens + replayed * 265, rel=0.1)
    assert any(f"{found.examples - 90:,} are replayed" in note for note in notes)


DIVISIONS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("plain", rows(100), {}),
    ("two", rows(2), {}),
    ("one", rows(1), {}),
    ("few", rows(7), {"eval_fraction": 0.05}),
    ("none held out", rows(50), {"eval_fraction": 0.0}),
    ("at most", rows(90), {"eval_fraction": 0.5, "eval_limit": 11}),
    ("many alike", [*rows(6), *([rows(1, start=77)[0]] * 60)], {}),
    ("groups", [{"text": f"Passage {n} of {n * n}: " + "word " * (n % 50), "group": f"g{n // 40}"} for n in range(100)], {}),
    ("one group", [{"text": f"Passage {n} of {n * n}, " + "word " * (n % 50), "group": "g"} for n in range(50)], {}),
    ("limit", rows(100), {"limit": 33}),
]


@pytest.mark.parametrize(("content", "settings"), [case[1:] for case in DIVISIONS], ids=[case[0] for case in DIVISIONS])
def test_the_split_has_the_sizes_of_the_runs_own(tmp_path: Path, content: list[Any], settings: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "a.jsonl", content)
    found = looked_at(path, **settings)
    assert (found.examples, found.eval_examples) == prepared_sizes(tmp_path, path, **settings)


def test_running_text_of_two_documents_is_divided_as_the_run_divides_it(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("".join(f"Line {name} {n} {n * n}. " + "word " * 30 + "\n\n" for n in range(400)))
    found = looked_at(tmp_path / "a.md", tmp_path / "b.md")
    assert found.kinds == ("text",) and found.supervised_share == 1
    recipe = Recipe(train=(str(tmp_path / "a.md"), str(tmp_path / "b.md")))
    manifest = prepare(
        recipe, "t", resolve_template(tiny_tokenizer(), "auto"), tmp_path / "cache", lambda *_, **__: None
    ).manifest  # type: ignore[arg-type]
    assert (found.examples, found.eval_examples) == (manifest["train_examples"], manifest["eval_examples"])


def test_all_alike_cannot_be_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows(1) * 20)
    with pytest.raises(DataError) as raised:
        looked_at(path)
    assert raised.value.code == "DATASET_TOO_SMALL"
    assert looked_at(path, eval_fraction=0).duplicate_share == pytest.approx(0.95)


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Tell me of number {n}.", "chosen": "A river runs by. " * (1 + n % 5), "rejected": f"I do not know {n}."}
        for n in range(count)
    ]


def rated(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 4 == 0} for n, row in enumerate(pairs(count))]


def scored(count: int) -> list[dict[str, Any]]:
    """Several answers to each prompt with ratings, which make pairs or labels."""
    return [
        {"prompt": f"Tell me of number {n // 3}.", "response": f"A river, {n} times.", "rating": float(n % 3)}
        for n in range(count)
    ]


FORMS: list[tuple[Form, list[dict[str, Any]], dict[str, Any]]] = [
    ("pair", pairs(60), {}),
    ("rated", rated(60), {}),
    ("rated", pairs(30), {}),
    ("prompt", rows(40), {}),
    ("prompt", pairs(40), {"eval_fraction": 0.0}),
    ("pair", scored(60), {"mapping": {"prompt": "prompt", "answer": "response", "rating": "rating"}}),
    ("rated", scored(60), {"mapping": {"prompt": "prompt", "answer": "response", "rating": "rating"}}),
]


@pytest.mark.parametrize(("form", "content", "settings"), FORMS, ids=[f"{n}-{case[0]}" for n, case in enumerate(FORMS)])
def test_rows_of_every_form_are_counted_as_the_run_makes_them(
    tmp_path: Path, form: Form, content: list[Any], settings: dict[str, Any]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", content)
    tokenizer = tiny_tokenizer()
    found, _ = planning.look_at_data(Data(train=[str(path)], **settings), tokenizer.backend_tokenizer, form=form)
    assert found is not None and found.form == form
    recipe = Recipe(train=(str(path),), form=form, **settings)
    made = prepare(recipe, "t", resolve_template(tokenizer, "auto"), tmp_path / "cache", lambda *_, **__: None)  # type: ignore[arg-type]
    assert (found.examples, found.eval_examples) == (made.manifest["train_examples"], made.manifest["eval_examples"])
    lengths = made.train["length"]
    assert found.mean_tokens == pytest.approx(sum(lengths) / len(lengths), rel=0.15)
    prompts = made.train["length"] if form == "prompt" else made.train["prompt_length"]
    assert found.prompt_tokens == pytest.approx(sum(prompts) / len(prompts), rel=0.3)
    if form == "pair":
        both = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in made.train]
        assert found.both_tokens == pytest.approx(sum(both) / len(both), rel=0.15)
        assert found.length_ratio == pytest.approx(made.manifest["pairs"]["length_ratio"], rel=0.15)
    if form == "rated":
        labels = [*made.train["label"], *(made.eval["label"] if made.eval is not None else ())]
        assert found.good_share == pytest.approx(sum(labels) / len(labels))


def test_pairs_are_no_examples_for_supervised_tuning_and_conversations_no_pairs(tmp_path: Path) -> None:
    for form, content in (("supervised", pairs(9)), ("pair", rows(9)), ("rated", rows(9))):
        with pytest.raises(DataError) as raised:
            planning.look_at_data(Data(train=[str(jsonl(tmp_path / "a.jsonl", content))]), form=form)  # type: ignore[arg-type]
        assert raised.value.code == "DATASET_NOTHING_USABLE" and "for other objectives" in raised.value.message


def test_given_evaluation_files_are_compared_with_the_training_data(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", rows(50))
    held = jsonl(tmp_path / "e.jsonl", [*rows(10, start=45), *rows(1, start=49)])
    found = looked_at(train, eval=[str(held)])
    assert (found.examples, found.eval_examples, found.eval_overlap) == (50, 11, 6)


def test_kinds_that_no_objective_takes_do_not_count(tmp_path: Path) -> None:
    preference = [{"prompt": f"Q{n}?", "chosen": "x" * 4000, "rejected": "no"} for n in range(30)]
    mixed = jsonl(tmp_path / "a.jsonl", [*preference, *rows(20)])
    data = Data(train=[str(mixed)], eval_fraction=0)
    found, notes = planning.look_at_data(data)
    assert found is not None and (found.examples, found.kinds) == (20, ("chat",)) and found.mean_tokens < 200
    assert any("30 preference examples" in note for note in notes)
    with pytest.raises(DataError, match="for other objectives: 30 preference examples") as raised:
        looked_at(jsonl(tmp_path / "b.jsonl", preference))
    assert raised.value.code == "DATASET_NOTHING_USABLE" and "--set training.objective=dpo" in str(raised.value.remedy)
    with pytest.raises(DataError, match="1 unpaired example\\)") as raised:
        looked_at(jsonl(tmp_path / "c.jsonl", [{"prompt": "Why?", "completion": "No.", "label": False}]))
    assert "--set training.objective=kto" in str(raised.value.remedy)
    with pytest.raises(DataError, match="1 row rejected\\)") as raised:
        looked_at(jsonl(tmp_path / "d.jsonl", [{"prompt": "A question without an answer?"}]))
    assert "Join the file that holds the answers" in str(raised.value.remedy)


def test_a_prompt_format_written_by_hand_is_recognised(tmp_path: Path) -> None:
    by_hand = [{"text": f"<|im_start|>user\nQuestion {n}<|im_end|>\n<|im_start|>assistant\nAnswer<|im_end|>"} for n in range(20)]
    assert looked_at(jsonl(tmp_path / "a.jsonl", by_hand)).hand_formatted == "ChatML"
    assert looked_at(jsonl(tmp_path / "a.jsonl", rows(20))).hand_formatted is None


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "DATASET_EMPTY"),
        (b'{"a": 1}\n' * 5, "DATASET_NOTHING_USABLE"),
        (b"%PDF-1.7 ...", "DATASET_NOT_A_DATASET"),
        (b"\x1f\x8b\x08broken", "DATASET_NOT_A_DATASET"),
        (None, "DATASET_NOT_FOUND"),
    ],
)
def test_unusable_files_have_their_code(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        looked_at(path)
    assert raised.value.code == code
    good = jsonl(tmp_path / "good.jsonl", rows(30))
    if code not in ("DATASET_NOTHING_USABLE",):
        with pytest.raises(DataError) as raised:
            looked_at(good, eval=[str(path)])
        assert raised.value.code == code
        with pytest.raises(DataError):
            looked_at(good, path)


def test_no_file_is_no_figures() -> None:
    assert planning.look_at_data(Data()) == (None, ())


def test_one_very_long_text_is_not_tokenized_whole(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "the cat asks. " * 200_000}, {"text": "short"}])
    tokenizer = tiny_tokenizer().backend_tokenizer
    [whole] = tokenizer.encode_batch(["the cat asks. " * 20_000])
    assert looked_at(path, tokenizer=tokenizer, eval_fraction=0).length_percentiles[100] == pytest.approx(
        10 * len(whole.ids), rel=0.02
    )


def test_a_file_of_linked_rows_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = [
        row
        for n in range(2_000)
        for row in (
            {"message_id": f"q{n}", "parent_id": None, "role": "prompter", "text": f"Question {n}?", "message_tree_id": f"q{n}"},
            {
                "message_id": f"a{n}",
                "parent_id": f"q{n}",
                "role": "assistant",
                "text": f"Answer {n}.",
                "message_tree_id": f"q{n}",
            },
        )
    ]
    path = jsonl(tmp_path / "a.jsonl", tree)
    assert looked_at(path, eval_fraction=0).examples == 2_000
    cut_after(monkeypatch)
    found, notes = planning.look_at_data(Data(train=[str(path)], eval_fraction=0))
    assert found is not None and found.examples == pytest.approx(2_000, rel=0.1) and "250 examples read" in notes[-1]


# --- machine ------------------------------------------------------------------------------------------


def hardware(*gpus: Gpu, packages: dict[str, str] | None = None) -> Hardware:
    return Hardware(
        gpus=gpus,
        gpu_problem=None,
        torch=Torch(),
        cpu=Cpu("Example CPU 9000", ("AVX2",), 8, 3.5, "cgroup"),
        memory=Memory(64 * GIB, 60 * GIB, "machine"),
        disk_free_bytes=10**12,
        python="3.12",
        system="Linux",
        packages=packages or {"torch": "2.13.0"},
    )


def test_a_known_card_has_the_drivers_memory_and_the_tables_rates() -> None:
    machine = planning.machine_here(hardware(Gpu("NVIDIA GeForce RTX 4090", "cuda", 24_564 * 2**20)))
    known = facts.gpu("RTX 4090")
    assert machine.device.name == "NVIDIA GeForce RTX 4090" and machine.device.memory_bytes == 24_564 * 2**20
    assert machine.device.flops_bf16 == known.flops_bf16 and machine.device.bf16 is True
    assert (machine.host_memory_bytes, machine.cores, machine.device_count, machine.observed) == (64 * GIB, 3.5, 1, True)
    assert planning.machine_here(hardware(Gpu("RTX 4090", "cuda", None))).device.memory_bytes == known.memory_bytes


def test_an_unknown_card_has_what_its_driver_tells() -> None:
    device = planning.machine_here(hardware(Gpu("Acme Vector 3", "cuda", 40 * GIB, bf16=False))).device
    assert (device.kind, device.memory_bytes, device.bf16, device.flops_bf16) == ("cuda", 40 * GIB, False, None)
    shared = planning.machine_here(hardware(Gpu("Acme Vector 3", "cuda"))).device
    assert shared.memory_bytes == 64 * GIB  # its memory is the machine's


def test_of_different_cards_those_like_the_first_count() -> None:
    cards = (Gpu("RTX 3090", "cuda", 24 * GIB), Gpu("RTX 3060", "cuda", 12 * GIB), Gpu("RTX 3090", "cuda", 24 * GIB))
    machine = planning.machine_here(hardware(*cards))
    assert [device.name for device in machine.devices] == ["RTX 3090", "RTX 3090"]
    assert planning.machine_here(hardware(*cards), device="cpu").kind == "cpu"


def test_a_machine_without_cards_is_its_processor() -> None:
    machine = planning.machine_here(hardware())
    assert machine.kind == "cpu" and machine.device.name == "Example CPU 9000" and machine.device.memory_bytes == 64 * GIB
    assert (
        not machine.bitsandbytes and planning.machine_here(hardware(packages={"torch": "2", "bitsandbytes": "0.48"})).bitsandbytes
    )
    nameless = replace(hardware(), cpu=Cpu(None, (), 1, 0.1, "cgroup"))
    assert planning.machine_here(nameless).device.name
    assert planning.machine_here().device.memory_bytes > 0


# --- earlier runs -------------------------------------------------------------------------------------


def here() -> Machine:
    return planning.machine_here(hardware())


def leave_run(workspace: Workspace, name: str, plan: Any, metrics: Any) -> None:
    folder = workspace.runs_dir / f"{name}-20260101-001"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("name: x\n")
    for file, value in (("plan.json", plan), ("metrics.json", metrics)):
        (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))


def plan_of(total: int = 10 * GIB, uncertain: int = 4 * GIB, **changes: Any) -> dict[str, Any]:
    rate = here().device.flops_fp32 or 0
    return {
        "device": "Example CPU 9000",
        "kind": "cpu",
        "memory": {"total_bytes": total, "uncertain_bytes": uncertain, "breakdown": {}},
        "cost": {"flops": rate * 100 * 0.25},
        "compute_dtype": "float32",
        "correction": 1.0,
        "training_seconds": 100.0,
    } | changes


def test_earlier_runs_teach_memory_and_speed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert planning.learn(workspace, here()) == planning.Learned() and planning.Learned().notes == ()
    leave_run(workspace, "a", plan_of(), {"peak_memory_bytes": 12 * GIB, "train_runtime": 100.0})
    learned = planning.learn(workspace, here())
    assert learned.memory_correction == pytest.approx(1.5)  # 6 GiB where 4 were uncertain
    assert learned.efficiency is not None and learned.efficiency.expected == pytest.approx(0.25)
    assert learned.runs == 1 and "1 earlier run " in learned.notes[0] and "1.50" in learned.notes[0]
    # A corrected prediction that was met teaches the same again.
    leave_run(workspace, "b", plan_of(12 * GIB, 6 * GIB, correction=1.5), {"peak_memory_bytes": 12 * GIB, "train_runtime": 50.0})
    learned = planning.learn(workspace, here())
    assert learned.memory_correction == pytest.approx(1.5) and learned.runs == 2
    assert learned.efficiency is not None and learned.efficiency.expected == pytest.approx(0.375)


def test_runs_elsewhere_unfinished_or_damaged_teach_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    measured = {"peak_memory_bytes": 12 * GIB, "train_runtime": 100.0}
    leave_run(workspace, "elsewhere", plan_of(device="RTX 4090"), measured)
    damaged: list[tuple[Any, Any]] = [
        ("{", measured), ("[]", measured), ("", measured), ("[" * 100_000, measured), (plan_of(), "nonsense"), (plan_of(), {}),
        (plan_of(memory=None, cost=[]), measured), (plan_of(memory={"total_bytes": "x"}, cost=None), measured),
        (plan_of(), {"peak_memory_bytes": -1, "train_runtime": True}), (plan_of(cost={"flops": -3}, memory={}), measured),
        (plan_of(uncertain=0, cost={}, compute_dtype=7), measured),
    ]  # fmt: skip
    for number, (plan, metrics) in enumerate(damaged):
        leave_run(workspace, f"damaged{number}", plan, metrics)
    leave_run(workspace, "unplanned", {}, measured)
    assert planning.learn(workspace, here()) == planning.Learned()


# --- failures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("ws"), steps=4)


def test_a_finished_run_whose_prompts_failed_says_what_to_change(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    assert planning.next_runs(folder) == []
    write_json(folder / "metrics.json", {"suite_pass_share": 0.2, "steps": 1_000})
    assert planning.next_runs(folder) == []  # without its settings nothing can be computed
    (folder / "run.yaml").write_text((finished / "run.yaml").read_text())
    found = planning.next_runs(folder)
    assert {"training.max_steps": 2_000} in [item.settings for item in found]
    write_json(folder / "metrics.json", {"suite_pass_share": 1.0, "steps": 1_000})
    assert planning.next_runs(folder) == []


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The settings of a run with usable data, without events."""
    folder = tmp_path / "runs" / finished.name
    folder.mkdir(parents=True)
    base = str(finished.parent.parent / "base")
    data = jsonl(tmp_path / "d.jsonl", rows(50))
    config, origins = build_config({"model": {"base": base}, "data": {"train": [str(data)]}, "training": {"batch_size": 8}})
    (folder / "run.yaml").write_text(dump_config(config, origins))
    return folder


def events(run_dir: Path, *said: dict[str, Any]) -> None:
    jsonl(
        run_dir / "events.jsonl",
        [{"seq": n, "time": f"2026-01-01T00:00:{n:02}+00:00", **event} for n, event in enumerate(said, 1)],
    )


STARTED = {"event": "started", "attempt": 1}
TRACE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.20 GiB is free."


def test_a_run_out_of_memory_gets_remedies_of_its_own(run_dir: Path) -> None:
    events(run_dir, STARTED, {"event": "failed", "code": "OUT_OF_MEMORY", "message": "Memory ran out."})
    (run_dir / "traceback.txt").write_text(TRACE)
    found = planning.diagnose_run(run_dir)
    assert found is not None and found.code == "OUT_OF_MEMORY" and "out of memory" in found.evidence.lower()
    halved = next(remedy for remedy in found.remedies if "training.batch_size" in remedy.settings)
    assert 0 < halved.settings["training.batch_size"] < 8 and halved.saves


def test_the_traceback_of_an_earlier_attempt_is_not_taken_for_this_ones(run_dir: Path) -> None:
    (run_dir / "traceback.txt").write_text(TRACE)
    os.utime(run_dir / "traceback.txt", (1e9, 1e9))
    events(run_dir, STARTED, {"event": "failed", "code": "STORAGE_DISK_FULL", "message": "No space left on device"})
    found = planning.diagnose_run(run_dir)
    assert found is not None and found.code == "STORAGE_DISK_FULL" and "CUDA" not in found.evidence


def test_a_run_that_ended_without_a_word_was_killed(run_dir: Path) -> None:
    events(run_dir, STARTED, {"event": "log", "step": 3, "loss": 1.5})
    found = planning.diagnose_run(run_dir)
    told = planning.diagnose_run(run_dir, exit_status=-9)
    assert found is not None and told is not None and found.case == told.case and "memory" in found.cause
    (run_dir / "run.yaml").write_text("[")
    assert (found := planning.diagnose_run(run_dir)) is not None and found.remedies


@pytest.mark.parametrize("ending", [{"event": "complete", "total_steps": 4}, {"event": "stopped", "step": 2}])
def test_a_run_that_did_not_fail_has_no_diagnosis(run_dir: Path, ending: dict[str, Any]) -> None:
    failed = {"event": "failed", "code": "OUT_OF_MEMORY", "message": "Memory ran out."}
    events(run_dir, STARTED, failed, {**STARTED, "attempt": 2}, ending)
    assert planning.diagnose_run(run_dir) is None


def test_a_run_whose_files_are_gone_is_diagnosed_all_the_same(run_dir: Path, tmp_path: Path) -> None:
    events(run_dir, STARTED, {"event": "failed", "code": "TRAINING_FAILED", "message": "boom"})
    (run_dir / "traceback.txt").write_text(TRACE)
    (tmp_path / "d.jsonl").unlink()
    found = planning.diagnose_run(run_dir)
    assert found is not None and found.remedies and "CUDA out of memory" in found.evidence


# --- the whole look -----------------------------------------------------------------------------------


def test_a_look_knows_what_the_run_will_use(nowhere: Path) -> None:
    base = save_tiny(nowhere / "base")
    data = jsonl(nowhere / "d.jsonl", rows(100))
    config, origins = build_config({"model": {"base": str(base)}, "data": {"train": [str(data)]}, "training": {"batch_size": 4}})
    seen = planning.look(config, origins, workspace=Workspace(nowhere / "ws"), machine=here(), network=False, threads=1)
    assert seen.situation.data is not None and seen.situation.data.counted
    assert seen.situation.model is not None and 0 < seen.situation.model.vocabulary_size <= 512
    assert seen.situation.added_tokens is not None and "<|im_end|>" in seen.situation.added_tokens
    assert seen.situation.estimate is not None and seen.situation.estimate.total_bytes > 0
    cost = seen.cost_with()
    assert cost is not None and cost.seconds.expected > 0
    assert planning.look(build_config({"model": {"base": "7B"}})[0], machine=here()).cost_with() is None
    with pytest.raises(FineTuneFlowError):
        planning.look(config, gpu="RTX 4096")


def test_nothing_heavy_is_imported(nowhere: Path) -> None:
    data = jsonl(nowhere / "d.jsonl", rows(100))
    program = f"""
import sys
from finetuneflow import planning
from finetuneflow.config import build_config
config, origins = build_config({{"model": {{"base": "starter"}}, "data": {{"train": [{str(data)!r}]}}}})
seen = planning.look(config, origins, network=False)
assert seen.situation.data.counted and seen.situation.estimate
print([name for name in ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_run_file_that_ran_on_another_number_of_devices_is_noticed(tmp_path: Path) -> None:
    from finetuneflow.knowledge.lint import check

    workspace = Workspace(tmp_path)
    config, origins = build_config({"name": "many", "training": {"batch_size": 8}})
    for run, devices in (("many-20260101-001", 2), ("many-20260102-001", 8), ("many-more-20260103-001", 1)):
        write_json(workspace.runs_dir / run / "plan.json", {"devices": devices})
        (workspace.runs_dir / run / "run.yaml").write_text("name: many\n")
    seen = planning.look(config, origins, workspace=workspace, gpu="RTX 4090", count=2, network=False)
    assert seen.situation.device_count_before == 8
    assert "GPU_COUNT_CHANGED" in {finding.code for finding in check(seen.situation)}
    alike = planning.look(config, origins, workspace=workspace, gpu="RTX 4090", count=8, network=False)
    assert "GPU_COUNT_CHANGED" not in {finding.code for finding in check(alike.situation)}
