"""
The tools that take a checkpoint: sample.py, hellaswag.py and hub.py, on a model of random weights, and each bad input's one line.
    python -m pytest tests/test_checkpoint_tools.py

hub.py is the real huggingface_hub client against a local stand-in of the Hub. Nothing here needs a network.
"""
import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT
from safetensors.torch import save_file
from test_data_scripts import Hub, HubHandler

import train_gpt_xla as t
from checkpoint import load_weights

sys.path.insert(0, str(ROOT / "tools"))
import hellaswag
import hub
import sample

FIELDS = dict(vocab_size=301, bos_id=BOS, num_heads=6, head_dim=8, model_dim=48, bigram_dim=48, bigram_vocab_size=512,
              bigram_sign_table_rows=64, block_size=16, dc_window=20, num_scheduled_iterations=24, num_extension_iterations=4,
              dtype="float32", ws_short_schedule=(1, 1, 2, 2), ws_long_schedule=(2, 2, 3, 4), ws_validate_post_yarn_ext=6)
OPTIONS = [f"--{name}={value}" for name, value in FIELDS.items()]
PARAMETERS = dict(num_layers=11, num_heads=6, head_dim=8, model_dim=48, block_size=16, bigram_vocab_size=512, bigram_sign_table_rows=64)

VOCABULARY = OPTIONS[:2]
GPT2S = ["--vocab_size=50257", "--bos_id=50256"]

def save(folder, vocab_size):
    """A checkpoint of upstream's form, as torch.compile names its parameters. No weight is zero, so each part matters."""
    torch.manual_seed(0)
    model = t.GPT(vocab_size=vocab_size, **PARAMETERS)
    state = {name: model.to_upstream(name, x.detach() + 0.2 * torch.randn(x.shape))
             for name, x in torch.nn.Module.state_dict(model).items()}
    path = folder / "toy" / "state_step000028.pt"
    path.parent.mkdir()
    torch.save(dict(step=28, code="", model={f"_orig_mod.{name}": x.float() for name, x in state.items()}, optimizer={}), path)
    return path

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("logs"), 301)

@pytest.fixture(scope="module")
def gpt2s(tmp_path_factory):
    """With GPT-2's vocabulary, for what is told to read and write text."""
    return save(tmp_path_factory.mktemp("logs"), 50257)

@pytest.fixture(scope="module")
def manager(checkpoint):
    return sample.load_model(str(checkpoint), OPTIONS)

def one_line(main, argv, *words):
    """main(argv) must exit with one line that holds all words."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    message = str(stop.value.code)
    assert "\n" not in message and all(str(word) in message for word in words), message

# -----------------------------------------------------------------------------
# The model as at the end of training

def test_model_is_that_of_the_last_validation(manager):
    """Windows, YaRN and embedding: the losses are those of a TrainingManager that went through the whole schedule."""
    args = t.Hyperparameters(**FIELDS, val_batch_size=8 * 128)
    rng = np.random.default_rng(0)
    tokens, documents = rng.integers(0, 301, (8, 129)), np.repeat([[0, 40]], [40, 88], axis=1).repeat(8, axis=0)
    bigrams = t.get_bigram_hash(tokens[:, :-1], args.bigram_vocab_size)
    batch = torch.from_numpy(np.stack([tokens[:, :-1], tokens[:, 1:], documents, bigrams], axis=1).astype(np.int32))
    losses = manager("losses", batch)
    trained = t.TrainingManager(manager.model, args)  # puts the model back to step 0
    for step in range(args.num_iterations):
        trained.advance_schedule(step)
    trained.advance_schedule(args.num_iterations, train=False)
    expected = trained.validation_step(t.to_device(batch, "data"), t.to_device(trained.get_numbers())).cpu()
    assert torch.allclose(losses.mean(1), expected, rtol=1e-6)
    assert manager.graph.ws_long == 6 and manager.model.split_embed

# -----------------------------------------------------------------------------
# sample.py

PROMPTS = [[BOS, *np.random.default_rng(i).integers(0, 256, 3 + 9 * i).tolist()] for i in range(10)]  # two batches, 4 to 85 tokens

def full_logits(manager, rows) -> torch.Tensor:
    """[8, 128, V]: of all positions, by a forward pass over all of them."""
    batch = np.zeros((8, 4, 128), dtype=np.int32)
    for i, row in enumerate(rows):
        batch[i, 0] = np.random.default_rng(i).integers(0, 301, 128)  # whatever follows
        batch[i, 0, :len(row)] = row
    batch[:, 3] = t.get_bigram_hash(batch[:, 0], FIELDS["bigram_vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "softcapped_cross_entropy", lambda x, weight, _: t.softcapped_logits(x, weight)[1].T)
        patch.setattr(manager, "replay", t.Replay(manager.step_fn, manager.tensors, manager.constants))
        return manager("losses", torch.from_numpy(batch)).view(8, 128, -1)

def test_greedy_is_the_full_forwards_argmax(manager, capsys):
    texts = sample.generate(manager, PROMPTS, 20, temperature=0, top_k=0, seed=0)
    assert [len(x) for x in texts] == [20] * 10 and re.fullmatch(r"\d+\.\d tokens a second\n", capsys.readouterr().err)
    for half in (0, 8):
        prompts, more = PROMPTS[half:half + 8], texts[half:half + 8]
        best = full_logits(manager, [p + x for p, x in zip(prompts, more)])[..., :301].argmax(-1)
        for row, prompt, text in zip(best.tolist(), prompts, more):
            assert row[len(prompt) - 1:len(prompt) + 19] == text

def test_logits_at_each_position(manager):
    """
    Rows shorter than a chunk and longer than the windows, of 32 and 96 tokens; the third one ends on the way. Weights that are changed by
    1e-7 move single logits by 2e-4.
    """
    rng, ends = np.random.default_rng(1), [24, 25, 20, 39, 40, 41, 123, 60]
    rows = [[BOS, *rng.integers(0, 256, end - 1).tolist()] for end in ends]
    want, errors = full_logits(manager, rows), []
    for n in range(24):
        lengths = [min(1 + i + n, end) if i < 3 else end - 24 + n for i, end in enumerate(ends)]
        logits = manager.logits([row[:length] for row, length in zip(rows, lengths)], None if n else 128)
        for i, length in enumerate(lengths):
            errors.append((logits[i] - want[i, length - 1]).abs())
            assert errors[-1].max() < 5e-4, (i, length)
        if n == 1:
            compiled = t.graphs_compiled()
    assert t.graphs_compiled() == compiled
    assert torch.stack(errors).median() < 1e-5

@pytest.mark.parametrize("window, paired", [(7, False), (7, True), (8, True), (100, False), (100, True)])
def test_cached_attention(window, paired):
    """At each position what window_attention has there, in a row of two documents."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 48, 8).unbind()
    documents, scale = torch.tensor([[0] * 48, [0] * 20 + [20] * 28], dtype=torch.int32), torch.tensor(0.5)
    want = t.window_attention(q, k, v, documents, window, scale, paired)
    for first in (0, 16, 25):
        positions = first + torch.arange(16, dtype=torch.int32).expand(2, -1)
        here = slice(first, first + 16)
        got = sample.cached_attention(q[:, :, here], k, v, documents[:, here], window, scale, paired, positions)
        assert torch.allclose(got, want[:, :, here], atol=1e-5)

@pytest.mark.parametrize("window", [1, 7, 20, 100])
def test_cached_dc(window):
    """The same of dc_attention."""
    torch.manual_seed(0)
    qkv, y, (w1, w2) = torch.randn(2, 12, 48, 8), torch.randn(2, 48, 32), torch.randn(2, 2, 48, 4)
    documents, scale = torch.tensor([[0] * 48, [0] * 20 + [20] * 28], dtype=torch.int32), torch.tensor(0.5)
    want, (q, k, v) = t.dc_attention(qkv, y, w1, w2, documents, window, scale), qkv.chunk(3, dim=1)
    for first in (0, 16, 25):
        positions = first + torch.arange(16, dtype=torch.int32).expand(2, -1)
        here = slice(first, first + 16)
        rest = (x[:, here] for x in (y, w1, w2, documents))
        got = sample.cached_dc(q[:, :, here], k, v, *rest, window, scale, positions)
        assert torch.allclose(got, want[:, here], atol=1e-5)

def test_sampling(manager):
    draw = lambda prompts, seed, temperature=1.0, top_k=50: sample.generate(manager, prompts, 5, temperature, top_k, seed)
    texts = draw(PROMPTS[:3], seed=1)
    assert texts == draw(PROMPTS[:3], seed=1) and texts[0] == draw(PROMPTS[:1], seed=1)[0], "a row's text depends on the others"
    assert texts != draw(PROMPTS[:3], seed=9)
    assert draw(PROMPTS[:3], 0, temperature=0) == draw(PROMPTS[:3], 0, top_k=1)

def test_choice():
    """Frequencies of the drawn tokens are the softmax's at that temperature, among the top_k."""
    logits, generator = torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.Generator().manual_seed(0)
    drawn = np.bincount([sample.choose(logits, 2.0, 3, generator) for _ in range(4000)], minlength=4) / 4000
    assert np.allclose(drawn, np.exp([0.5, 1.5, 1, -np.inf]) / np.exp([0.5, 1.5, 1]).sum(), atol=0.03) and drawn[3] == 0

def test_a_text_ends_before_the_next_document(manager, monkeypatch):
    tokens = iter([5, 6, BOS, 7, BOS])
    monkeypatch.setattr(sample, "choose", lambda *_: next(tokens))
    assert sample.generate(manager, PROMPTS[:2], 9, 1.0, 0, 0) == [[5], [6, 7]]

def test_sample_prints_text(gpt2s, capsys):
    args = t.Hyperparameters(**FIELDS | dict(vocab_size=50257, bos_id=50256))
    (gpt2s.parent.parent / "toy.txt").write_text(f"{args}\n")  # the run's log: no options are needed
    sample.main([str(gpt2s), "--bytes", "--tokens", "3", "--prompt", "import os", "été"])
    out, err = capsys.readouterr()
    assert out.startswith("> import os\n") and "\n> été\n" in out
    assert "step 28 of 28, 48 dims, 6 heads, windows of 32 and 96 tokens, float32" in err

def test_byte_tokens_come_back_as_text():
    encode, decode = sample.tokenizer(single_bytes=True)
    assert decode(encode("naïve\n").tolist()[1:]) == "naïve\n" and encode("")[0] == 50256

def tables(vocab_size: int, model_dim: int, bigrams: int, signs: int) -> dict:
    """Those whose shapes tell a model's sizes."""
    shapes = {"embed.weight": vocab_size, "bigram_embed.weight": bigrams, "bigram_sign_table": signs}
    return {name: torch.empty(rows, model_dim, device="meta") for name, rows in shapes.items()}

@pytest.mark.parametrize("sizes, expected", [
    ((50304, 48, 4096, 512), (86, 16, 14, 4096)), ((50304, 768, 377280, 8192), (1285, 128, 112, 377280)),
    ((50304, 48, 512, 64), (1285, 128, 112, 512)),
])
def test_presets_are_found_by_size(sizes, expected, capsys):
    args = sample.get_args("x.pt", dict(model=tables(*sizes)), [])
    assert (args.num_iterations, args.block_size, args.dc_window, args.bigram_vocab_size) == expected
    preset = "rehearsal" if expected[0] == 86 else "record"
    assert f"x.pt: nothing tells its run's hyperparameters, so those of --preset {preset} are taken" in capsys.readouterr().err

def broken(tmp_path, name, checkpoint):
    """Path and words of a checkpoint that is none of ours."""
    path = tmp_path / "bad.pt"
    good = torch.load(checkpoint)
    if name == "no file":
        return path, ["bad.pt", "No such file"]
    if name == "text":
        path.write_text("step:0/96 val_loss:10.7\n")
        return path, ["bad.pt: not a checkpoint", "--save_checkpoint"]
    if name == "half":
        path.write_bytes(checkpoint.read_bytes()[:100_000])
        return path, ["bad.pt: not a checkpoint"]
    if name == "list":
        torch.save([1, 2], path)
        return path, ["bad.pt: not a checkpoint"]
    if name == "another model":
        good["model"] = {"transformer.wte.weight": torch.zeros(4, 4)}
    if name == "no bigrams":
        del good["model"]["_orig_mod.bigram_embed.weight"]
    if name == "no table":
        good["model"]["_orig_mod.bigram_sign_table"] = torch.zeros(64)
    if name == "lacks one":
        del good["model"]["_orig_mod.mlp_bank"]
    if name == "shape":
        good["model"]["_orig_mod.resid_lambdas"] = torch.zeros(12, 2)
    if name == "not 6 heads":
        good["model"]["_orig_mod.embed.weight"] = torch.zeros(384, 56)
    if name == "later":
        good["step"] = 29
    torch.save(good, path)
    return path, dict([("another model", ["bad.pt: ", "model has no ", "--save_checkpoint"]),
                       ("no bigrams", ["bad.pt: ", "bigram_embed.weight", "--save_checkpoint"]),
                       ("no table", ["bad.pt: bigram_sign_table is of shape (64,)", "--save_checkpoint"]),
                       ("lacks one", ["bad.pt: ", "mlp_bank is missing"]),
                       ("shape", ["bad.pt: ", "resid_lambdas", "(12, 2)", "(11, 2)"]),
                       ("not 6 heads", ["bad.pt: ", "num_heads 6 x head_dim 9 must be model_dim 56"]),
                       ("later", ["bad.pt is from step 29", "28", "--preset"])])[name]

@pytest.mark.parametrize("name", ["no file", "text", "half", "list", "another model", "no bigrams", "no table", "lacks one", "shape",
                                  "not 6 heads", "later"])
def test_broken_checkpoint(tmp_path, checkpoint, name):
    path, words = broken(tmp_path, name, checkpoint)
    one_line(sample.main, [path, "--bytes", *OPTIONS], "sample.py: ", *words)

def test_mistyped_option(checkpoint, capsys):
    with pytest.raises(SystemExit):
        sample.main([str(checkpoint), "--bytes", "--blocksize", "16"])
    assert "--blocksize is not an option: did you mean --block_size" in capsys.readouterr().err

@pytest.mark.parametrize("tool", [sample, hellaswag, hub])
@pytest.mark.parametrize("vocab_size", [256, 385, 50257])
def test_a_vocabulary_that_is_not_the_tables(checkpoint, tool, vocab_size):
    """Smaller, its ids would miss rows that were learned; larger, they would run past the table."""
    words = "its table has 384 rows", f"vocabulary of {vocab_size:,}", "--vocab_size and --bos_id"
    argv = {sample: [checkpoint, "--bytes"], hub: ["push", checkpoint, "someone/toy"],
            hellaswag: [checkpoint, "--bytes", "--data", ROOT / "tests/data/hellaswag.jsonl"]}[tool]
    one_line(tool.main, [*argv, *OPTIONS, f"--vocab_size={vocab_size}", f"--bos_id={vocab_size - 1}"], f"{tool.__name__}.py: ", *words)

def test_no_vocabulary(checkpoint, monkeypatch):
    monkeypatch.setattr(sample.fineweb, "encoder", lambda _: (_ for _ in ()).throw(OSError("tiktoken cannot get GPT-2's vocabulary")))
    one_line(sample.main, [checkpoint, *OPTIONS], "tiktoken cannot get")

# -----------------------------------------------------------------------------
# hellaswag.py

QUESTIONS = ROOT / "tests" / "data" / "hellaswag.jsonl"

def test_packed_losses_are_those_of_each_ending_alone(manager):
    questions = hellaswag.read_questions(QUESTIONS)
    tokenize = lambda text: list(text.encode()[::3])  # a third of the text, so that several fit in a row
    endings = hellaswag.get_endings(questions, lambda text: np.array([BOS, *tokenize(text)]))
    batches = [places for _, places in hellaswag.pack(endings, 128, manager.args)]
    assert len(batches) > 1 and len({row for _, row, _, _ in batches[0]}) == 8 and len(batches[0]) > 16, "too few to show anything"
    losses = hellaswag.ending_losses(manager, endings, 128)
    for i in range(0, len(endings), 5):
        context, ending = tokenize(questions[i // 4]["ctx"]), tokenize(" " + questions[i // 4]["endings"][i % 4])
        tokens = [BOS, BOS, BOS, BOS, *context, *ending]
        batch = np.zeros((8, 4, 128), dtype=np.int32)
        batch[3, 0, :len(tokens) - 1], batch[3, 1, :len(tokens) - 1] = tokens[:-1], tokens[1:]
        batch[3, 2] = np.minimum(np.arange(128), 3)
        batch[:, 3] = t.get_bigram_hash(batch[:, 0], FIELDS["bigram_vocab_size"])
        alone = manager("losses", torch.from_numpy(batch))[3].numpy()
        alone = alone[len(tokens) - 1 - len(ending):len(tokens) - 1]
        assert np.allclose(losses[i], [alone.sum(), alone.mean()], rtol=2e-6), questions[i // 4]

def test_score():
    """The sum and the mean may choose differently: a short ending has the smaller sum."""
    losses = np.array([[9, 3.0], [8, 4], [10, 2], [9, 5],   [1, 1], [2, 2], [3, 3], [4, 4]])
    assert hellaswag.score(losses, [1, 0]) == (1.0, 0.5) and hellaswag.score(losses, [2, 3]) == (0.0, 0.5)

def test_hellaswag_prints_its_line(gpt2s, capsys):
    hellaswag.main([str(gpt2s), "--data", str(QUESTIONS), "--limit", "3", "--tokens", "128", "--bytes", *OPTIONS, *GPT2S])
    acc = capsys.readouterr().out
    assert acc.startswith("HellaSwag: 3 questions, acc 0.") or acc.startswith("HellaSwag: 3 questions, acc 1."), acc

@pytest.mark.parametrize("line", ["{", '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', '{"ctx": "a", "label": 0}', "[]", "",
                                  '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}'])
def test_questions_of_another_kind(tmp_path, checkpoint, line):
    path = tmp_path / "q.jsonl"
    path.write_text(QUESTIONS.read_text().splitlines()[0] + f"\n{line}\n")
    one_line(hellaswag.main, [checkpoint, "--data", path, "--bytes"], "hellaswag.py: ", "q.jsonl:2", "not a HellaSwag question")

def test_no_questions(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "empty.jsonl").touch()
    one_line(hellaswag.main, [checkpoint, "--data", tmp_path / "empty.jsonl"], "empty.jsonl is empty")
    one_line(hellaswag.main, [checkpoint, "--data", tmp_path / "none.jsonl"], "none.jsonl", "No such file")
    monkeypatch.setattr(hellaswag, "ROOT", tmp_path)
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/hellaswag_val.jsonl")
    one_line(hellaswag.main, [checkpoint], "cannot fetch http://127.0.0.1:1", "--data FILE")
    assert not list((tmp_path / "data" / "hellaswag").iterdir())

# -----------------------------------------------------------------------------
# hub.py, against a stand-in of the Hub

class ModelHandler(HubHandler):
    """Takes what the client sends: files of a commit, large ones by Git LFS."""
    def take(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.command == "PUT":
            self.server.large[self.path.rpartition("/")[2]] = body
            return {}
        assert self.headers["Authorization"] == "Bearer hf_test", self.path
        if self.path.endswith("/commit/main"):
            for item in map(json.loads, body.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
            return {"commitUrl": f"{self.server.url}/someone/toy/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
        sent = json.loads(body)
        if self.path.endswith("/objects/batch"):
            upload = lambda x: {"upload": {"href": f"{self.server.url}/lfs/{x['oid']}"}}
            return {"transfer": "basic", "objects": [x | {"actions": upload(x)} for x in sent["objects"]]}
        if self.path.endswith("/preupload/main"):
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            return {"files": [{"path": x["path"], "uploadMode": mode(x["path"]), "shouldIgnore": False} for x in sent["files"]]}
        if self.path == "/api/repos/create":
            assert (sent["organization"], sent["name"]) == ("someone", "toy")
            return {"url": f"{self.server.url}/someone/toy"}
        assert self.path == "/api/validate-yaml", self.path
        return {"errors": [], "warnings": []}

    def do_POST(self):
        body = json.dumps(self.take()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST

LOG = f"""{"=" * 100}
Running on 8 CPU devices: [{{}}]
{t.Hyperparameters(**FIELDS, run_id="toy")}
step:0/28 val_loss:10.8272 train_time:0ms step_avg:0.02ms
step:28/28 train_time:5600ms step_avg:200.00ms
step:28/28 val_loss:LOSS train_time:5600ms step_avg:200.00ms
"""

def test_push_and_pull(checkpoint, tmp_path):
    server = Hub(ModelHandler)
    server.prefix, server.large, server.url = "/someone/toy/resolve/main", {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "toy.txt").write_text(LOG.replace("LOSS", "5.4321"))
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import hub; hub.main({{}})"
    env = os.environ | dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hf"), HF_TOKEN="hf_test", HF_HUB_DISABLE_XET="1",
                            HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1", TRACEBACK="1")
    push = ["push", str(checkpoint), "someone/toy", "--log", str(tmp_path / "toy.txt"), *OPTIONS]
    pull = ["pull", "someone/toy"]
    run = subprocess.run([sys.executable, "-c", f"{code.format(push)}; {code.format(pull)}"], cwd=tmp_path, env=env, capture_output=True,
                         text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(server.files) == {"model.safetensors", "config.json", "README.md"} and f"{server.url}/someone/toy/commit/1" in run.stdout
    card = server.files["README.md"].decode()
    assert "| validation loss | 5.4321 |" in card and "| training time | 5.6 s |" in card and "| devices | 8 CPU devices |" in card
    config = json.loads(server.files["config.json"])
    assert "record #89 of" in card and "48 dims,\n6 heads" in card
    assert config["step"] == 28 and "train_files" not in config
    assert config.items() >= {k: list(v) if isinstance(v, tuple) else v for k, v in FIELDS.items()}.items()
    pulled = tmp_path / "logs" / "toy" / "state_step000028.pt"
    theirs, ours = torch.load(checkpoint)["model"], load_weights(pulled)
    assert ours["optimizer"] == {}
    assert ours["model"].keys() == {name.removeprefix("_orig_mod.") for name in theirs}
    assert all(torch.equal(x, ours["model"][name.removeprefix("_orig_mod.")]) for name, x in theirs.items())
    args = sample.get_args(str(pulled), ours, [])  # with no option: what it needs came along
    assert {name: getattr(args, name) for name in FIELDS} == FIELDS

@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_card_leaves_out_what_is_not_there(checkpoint, tmp_path, monkeypatch, capsys, loss):
    """A dry run, without a token: the loss is no number, the devices are missing, the last line is half written."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("without a token nothing may be sent"))
    log = tmp_path / "toy.txt"
    log.write_text(LOG.replace("LOSS", loss).replace("Running on", "Runs on") + "step:29/2")
    hub.main(["push", str(checkpoint), "someone/toy", "--log", str(log), *OPTIONS])
    card = (checkpoint.parent / "hub" / "README.md").read_text()
    assert not re.search(r"\b(nan|inf|None|devices|validation loss)\b", card), card
    assert "nothing is sent to someone/toy" in capsys.readouterr().out

TOY = t.GPT(vocab_size=301, **PARAMETERS)
TOY_STATE = {name: TOY.to_upstream(name, x.detach()) for name, x in torch.nn.Module.state_dict(TOY).items()}

@pytest.fixture
def card(tmp_path, capsys):
    """hub.py push of a checkpoint from step 14 with this in it, beside or with this log: the card, and what is said on stderr."""
    path = tmp_path / "toy" / "state_step000014.pt"
    path.parent.mkdir()
    def push(log: str, given=False, options=OPTIONS, **content):
        content = dict(step=14, code="", model=TOY_STATE, optimizer={}) | content
        torch.save({name: x for name, x in content.items() if x is not None}, path)
        file = tmp_path / ("other.txt" if given else "toy.txt")
        file.write_text(log)
        hub.main(["push", str(path), "a/b", "--dry_run", *["--log", str(file)] * given, *options])
        return (path.parent / "hub" / "README.md").read_text(), capsys.readouterr().err
    return push

DATA = "data: {'train_files': [('fineweb_train_000001.bin', 100000000, 8)], 'val_files': [('v.bin', 50, 9)]}\n"

LONG = LOG.replace("step:28/28 train", """step:14/28 train_time:2900ms step_avg:207.14ms
step:14/28 val_loss:6.0000 train_time:2800ms step_avg:200.00ms
step:28/28 train""", 1).replace("LOSS", "5.4321")

@pytest.mark.parametrize("given", [False, True])
def test_figures_are_those_of_the_checkpoints_step(card, given):
    page, said = card(LONG, given)
    assert "| validation loss | 6.0000 |\n| at step | 14 of 28 |\n| training time | 2.8 s |\n| time a step | 200.00 ms |" in page
    assert "5.4321" not in page and not said
    page, said = card(LONG.replace("val_loss:6.0000 ", ""), given)
    assert "| at step | 14 of 28 |" in page and "validation loss" not in page and "none of step 14" in said
    page, said = card(LONG.replace("step:0/28", "starting with the weights of /x/y.pt\nstep:0/28"), given)
    assert "| starting with the weights of | y.pt |" in page
    assert "validation loss" not in card(LONG.replace("6.0000", "nan"), given)[0]

def test_the_card_names_fineweb_only_where_it_was_read(card):
    """A folder's name is no evidence: one's own shards are in one of that name, too."""
    for data, named in ((DATA, True), (DATA.replace("100000000", "99999999"), False), (DATA.replace("fineweb_train", "mine"), False),
                        ("", False)):
        log = LONG.replace("step:0/28", data + "step:0/28").replace("data/demo/demo_train", "data/fineweb10B/fineweb_train")
        assert ("datasets: [kjj0/fineweb10B-gpt2]" in card(log)[0]) == named, data
    assert "datasets" in card(LONG, data=dict(train_files=[("fineweb_train_000001.bin", 10**8, 8)]))[0]

def test_a_checkpoint_that_does_not_say_its_step(card, tmp_path):
    """It may be published, but without figures, and no step is made up for it."""
    page, said = card(LONG, given=True, step=None)
    assert "at step" not in page and "logs/b/state.pt" in page and "does not say of which step" in said and "--log FILE" not in said
    assert "step" not in json.loads((tmp_path / "toy" / "hub" / "config.json").read_text())

def test_hyperparameters_on_the_hub_are_the_runs(card, tmp_path):
    """Those of the checkpoint, of its log, wherever that is, or of upstream's source; else a preset's, which is said."""
    config = lambda: json.loads((tmp_path / "toy" / "hub" / "config.json").read_text())
    log = LONG.replace("cooldown_frac=0.6", "cooldown_frac=0.25")
    for given in (False, True):
        _, said = card(log, given, options=[])
        assert config()["cooldown_frac"] == 0.25 and not said
    (tmp_path / "toy.txt").unlink()
    card(log, given=True, options=VOCABULARY, hyperparameters=RUN["hyperparameters"] | dict(cooldown_frac=0.25))
    schedules = lambda: [config()[f"ws_{which}_schedule"] for which in ("short", "long")]
    _, said = card("a letter", options=VOCABULARY, code=UPSTREAM)
    assert schedules() == [[1, 1, 2, 2], [2, 2, 3, 4]] and config()["cooldown_frac"] == 0.5
    assert "nothing tells" not in said and "--val_tokens=9 * n" in said and "num_iterations" not in said
    _, said = card("a letter", options=VOCABULARY, code="import torch_xla\n" + UPSTREAM)
    assert schedules() == [[1, 3, 5, 6], [3, 7, 11, 13]]
    assert "nothing tells its run's hyperparameters, so those of --preset record" in said
    _, said = card("a letter", options=VOCABULARY, hyperparameters=dict(ws_long_schedule=(2, 2, 3, 4), of_a_later_version=1, seed="x"))
    assert schedules()[1] == [2, 2, 3, 4] and "no such: --of_a_later_version=1 --seed=x" in said

UPSTREAM = """class Hyperparameters:
    train_files: str = "data/fineweb_train_*.bin"
    val_tokens: int = 9 * n
    num_scheduled_iterations: int = 24
    num_extension_iterations: int = 4
    num_iterations: int = a + b

TRAINING_STAGES = [
    TrainingStage(duration=1/3, train_max_seq_len=32, batch_size=8 * 128, window_sizes=(1, 2)),
    TrainingStage(duration=1/3, train_max_seq_len=32, batch_size=8 * 128, window_sizes=(1, 2)),
    TrainingStage(duration=1/3, train_max_seq_len=32, batch_size=8 * 128, window_sizes=(2, 3)),
    TrainingStage(train_max_seq_len=32, batch_size=8 * 128, window_sizes=(2, 4)),
]
training_schedule = TrainingSchedule(TRAINING_STAGES, 24, 4, cooldown_frac=0.5)
"""

@pytest.mark.parametrize("content, words", [
    (dict(step="14"), "its step is '14' (str)"), (dict(step=-1), "its step is '-1' (int)"), (dict(step=torch.tensor(14)), "its step is "),
    (dict(code=7), "its code is '7' (int)"), (dict(hyperparameters=[1]), "its hyperparameters is '[1]' (list)"),
])
def test_entries_of_another_type(card, content, words):
    one_line(lambda _: card(LONG, **content), [], "toy/state_step000014.pt: ", words)

RUN = dict(hyperparameters=t.hyperparameters(t.Hyperparameters(**FIELDS)), run_id="toy")

@pytest.mark.parametrize("content, log, words", [
    (RUN | dict(run_id="another"), LONG, "run_id is "),
    (dict(hyperparameters=RUN["hyperparameters"] | dict(cooldown_frac=0.7)), LONG, "cooldown_frac is 0.6 there, 0.7 in the checkpoint"),
    (dict(hyperparameters=RUN["hyperparameters"] | dict(seed=1)), LONG, "seed is 0 there, 1"),
    ({}, LONG.replace("model_dim=48", "model_dim=96"), "model_dim is 96 there, 48"),
    ({}, LONG.replace("vocab_size=301", "vocab_size=50257"), "vocab_size is 50257 there, 384"),
    (dict(code="x = 1\n"), "x = 2\n" + LONG, "another source"),
    (dict(data=dict(train_files=[("a.bin", 9, 7)])), LONG.replace("step:0/28", DATA + "step:0/28"), "the shards of train_files are others"),
    ({}, LONG[:LONG.index("step:14/28")], "it ends at step 0, the checkpoint is from step 14"),
])
@pytest.mark.parametrize("given", [False, True])
def test_figures_of_another_run_are_left_out(card, content, log, words, given):
    page, said = card(log, given, **content)
    assert not re.search(r"6\.0000|5\.4321|training time|devices", page) and words in said and "is not the log of" in said

def test_a_log_that_does_not_say_whose_it_is(card):
    """Beside the checkpoint it may be anyone's; who gives it vouches for it. A source is enough, and so are hyperparameters."""
    bare = LONG.replace(re.search(r"Hyperparameters\(.*\)", LONG)[0], "")
    page, said = card(bare)
    assert "6.0000" not in page and "neither hyperparameters nor a source" in said
    assert "6.0000" in card(bare, given=True)[0]
    assert "6.0000" in card("x = 1\n" + bare, code="x = 1\n")[0]
    assert "6.0000" in card("x = 1\n" + LONG, code="x = 1\n", **RUN)[0]

def test_a_log_of_another_name_is_not_taken_for_the_checkpoints(card):
    """Copied beside it, or renamed with it: who knows gives it with --log. A model is that of its hyperparameters whatever the name."""
    other = LONG.replace("run_id='toy'", "run_id='other'").replace("cooldown_frac=0.6", "cooldown_frac=0.25")
    page, said = card(other, options=[])
    assert "6.0000" not in page and "is of a run called other" in said and "toy.txt if it is the log of" in said
    assert "nothing tells" not in said
    assert "6.0000" in card(other, given=True)[0] and "6.0000" in card(LONG)[0]

def test_a_log_of_two_runs(card):
    two = LONG + LONG.replace("5.4321", "5.4322").replace("seed=0", "seed=1")
    page, said = card(two)
    assert "6.0000" not in page and "holds more than one run" in said
    one_line(lambda _: card(two, given=True), [], "holds more than one run")
    assert "6.0000" in card(two, hyperparameters=RUN["hyperparameters"])[0], "the seed tells them apart"
    page, said = card("a letter")
    assert "toy.txt is no log" in said and "at step" not in page

def test_hyperparameters_come_from_the_checkpoints_own_log(tmp_path, capsys):
    """Those of the run that reached this step with these sizes; a start that failed, before or after, is none."""
    path = tmp_path / "toy" / "x.pt"
    start = lambda **fields: f"{'=' * 100}\n{t.Hyperparameters(**FIELDS | fields)}\n{'=' * 100}\n"
    end = "step:28/28 val_loss:5.0 train_time:9ms step_avg:9ms\n"
    def block_size(log, **content):
        (tmp_path / "toy.txt").write_text(log)
        return sample.get_args(str(path), dict(model=TOY_STATE, step=28) | content, VOCABULARY).block_size
    run, other = start(block_size=32) + end, start(block_size=64)
    for log in (run, other + run, run + other, run + other + "step:1/28 train_time:9ms step_avg:9ms\n", start(block_size=32)):
        assert block_size(log) == 32, log
    assert block_size(run + start(block_size=32, seed=1) + end.replace("5.0", "5.1")) == 32, "two runs, whose models are alike"
    assert not capsys.readouterr().err.count("left out: ")
    for log, words in ((start(model_dim=96, block_size=64) + end, "model_dim is 96 there, 48"), ("", "is empty"),
                       (run + other + end.replace("5.0", "5.1"), "more than one run"),
                       (start(block_size=32) + "step:20/28 train_time:9ms step_avg:9ms\n", "it ends at step 20")):
        assert block_size(log) == t.Hyperparameters().block_size and words in capsys.readouterr().err
    assert block_size(run, hyperparameters=dict(FIELDS | dict(block_size=16))) == 16, "the checkpoint's own go before"

class Answers(HubHandler):
    """Nothing but a status."""
    def answer(self, body):
        status, headers = self.server.status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(True)

@pytest.fixture
def answers(tmp_path, monkeypatch):
    """The real client, asking a Hub that has nothing but an answer."""
    from huggingface_hub import constants
    server = Hub(Answers)
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}

@pytest.mark.parametrize("status, headers, token, words", [
    (401, INVALID, "hf_test", ("401", "Invalid credentials", "has expired", "hf auth login")),
    (401, {"X-Error-Message": "Invalid username or password."}, "", ("401", "without a token", "someone/toy", "check the name")),
    (403, {}, "hf_test", ("403", "write access")),
    (404, {"X-Error-Code": "RepoNotFound"}, "hf_test", ("404", "no someone/toy, or it is private")),
    (429, {}, "hf_test", ("429", "too many requests", "wait")),
    (503, {}, "hf_test", ("503", "later")),
])
def test_what_the_hub_answers_is_told(answers, checkpoint, monkeypatch, status, headers, token, words):
    answers.status = status, headers
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again
    one_line(hub.main, ["pull", "someone/toy"], "hub.py: the Hub answers", *words)
    if token:
        one_line(hub.main, ["push", checkpoint, "someone/toy", *OPTIONS], "hub.py: the Hub answers", *words)

def test_a_hub_that_does_not_answer(answers, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again
    answers.status = 404, {"X-Error-Code": "EntryNotFound"}
    one_line(hub.main, ["pull", "someone/toy"], "404", "someone/toy lacks config.json")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}")
    one_line(hub.main, ["pull", "someone/toy"], "the Hub does not answer (", "check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one_line(hub.main, ["pull", "someone/toy"], "HF_HUB_OFFLINE is set")

def test_readme_commands_run(checkpoint, monkeypatch, capsys):
    """Those of README.md for these tools, on a checkpoint and with a model made here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ran = []
    for tool, options in re.findall(r"^    \$ python tools/(\w+)\.py (.*)", (ROOT / "README.md").read_text(), re.M):
        options = [str(checkpoint) if option.endswith(".pt") else option for option in shlex.split(options)]
        sys.modules[tool].main(options + OPTIONS)
        ran.append(tool)
    out = capsys.readouterr().out
    assert ran == ["sample", "hellaswag", "hub"]
    assert "> def main():" in out and "HellaSwag: 12 questions" in out and "nothing is sent" in out

def test_push_refuses(checkpoint, tmp_path):
    log = tmp_path / "other.txt"
    log.write_text("a letter\n")
    one_line(hub.main, ["push", checkpoint, "someone/toy", "--log", log, *OPTIONS], "hub.py: ", "other.txt")
    log.write_text("")
    one_line(hub.main, ["push", checkpoint, "someone/toy", "--log", log, *OPTIONS], "other.txt", "empty")
    one_line(hub.main, ["push", tmp_path / "none.pt", "someone/toy"], "none.pt", "No such file")
    one_line(hub.main, ["push", log, "someone/toy"], "other.txt: not a checkpoint")
    for repo in ("toy", "someone/", "https://huggingface.co/someone/toy", "someone/to y"):
        for argv in (["push", checkpoint, repo, *OPTIONS], ["pull", repo]):
            one_line(hub.main, argv, f"hub.py: '{repo}' is not USER/NAME")

def test_pull_refuses(tmp_path, monkeypatch):
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: tmp_path / name)
    for text, words in (('{"model_type": "gpt2"}', "a/b is no modded-nanogpt by its config.json"), ("[]", "a/b is no modded-nanogpt"),
                        ("{", "config.json: not JSON")):
        config.write_text(text)
        one_line(hub.main, ["pull", "a/b"], words)
    ours = lambda **fields: config.write_text(json.dumps(dict(model_type="modded-nanogpt", step=14) | RUN["hyperparameters"] | fields))
    ours()
    weights.write_bytes(b"\x09" + bytes(7) + b"{")
    one_line(hub.main, ["pull", "a/b"], "model.safetensors: safetensors that are cut short")
    save_file({"blocks.0.attn.qkvo_w": torch.zeros(3)}, weights)
    one_line(hub.main, ["pull", "a/b"], "blocks.0.attn.qkvo_w, so it is record #60's, whose folder in records/ says")
    save_file(TOY_STATE, weights)
    for fields, words in ((dict(step="14"), "a/b: its step is '14'"), (dict(block_size=0), "a/b: block_size is 0"),
                          (dict(step=29), "from step 29")):
        ours(**fields)
        one_line(hub.main, ["pull", "a/b"], words)
    ours()
    (tmp_path / "there.pt").touch()
    one_line(hub.main, ["pull", "a/b", "-o", tmp_path / "there.pt"], "there.pt is there already", "-o")
    monkeypatch.setattr(torch, "save", lambda state, path: path.write_text("x") and (_ for _ in ()).throw(OSError(28, "No space left")))
    one_line(hub.main, ["pull", "a/b"], "No space left")
    assert not list((tmp_path / "logs").rglob("*.pt*"))
