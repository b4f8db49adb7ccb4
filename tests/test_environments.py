"""What people's machines bring: matplotlib's settings, dates, copied files, embedders, locales; and
runs in which nothing was learnt."""
# ruff: noqa: F401, F811      fixtures of other test files are imported by name
import json
import os
import re
import shutil
import subprocess
import sys

import kill_test
import pytest
from conftest import ROOT, everything, rows, run
from test_evaluate import graded, report, run_folder, table_row
from test_stages import HEAD, SLOW, call, house, house_in, made, said

import compare
import evaluate
import refine
import sft
from core import embeddings, settings
from core.records import InputError, write_json, write_jsonl
from core.training import significant
from tasks import why_no_pairs

# ---------------------------------------------------------------- figures
ODD = """backend: nonsense
text.usetex: True
font.family: Comic Sans
axes.prop_cycle: cycler('color', ['ff0000'])
axes.formatter.use_locale: True
savefig.format: svg
savefig.bbox: tight
savefig.directory: /nowhere
savefig.facecolor: black
figure.dpi: 30
figure.constrained_layout.use: False
no.such.key: 1
lines.linewidth: many
"""


def drawn(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".html")}


@pytest.mark.parametrize("backend, settings_at", [
    ("nonsense", "odd"), ("module://matplotlib_inline.backend_inline", "odd/matplotlibrc"),
    ("TkAgg", "broken")])
def test_figures_are_the_same_whatever_matplotlib_is_told(backend, settings_at, run_folder,
                                                          tmp_path):
    """A backend that is none, one of a notebook, one that needs a display; a matplotlibrc with
    LaTeX; one that is no text; a folder of settings that cannot be written."""
    report(run_folder)
    expected = drawn(run_folder)
    assert len(expected) == 6
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/matplotlibrc").write_text(ODD)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/matplotlibrc").write_bytes(b"\xff\xfe\xff")
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "HOME")}
    done = subprocess.run(
        [sys.executable, "evaluate.py", "report", run_folder], cwd=ROOT, capture_output=True,
        text=True, env={**kept, "MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path / settings_at)})
    assert (done.returncode, done.stderr) == (0, "")
    assert drawn(run_folder) == expected


def test_what_a_notebook_has_set_changes_no_figure_and_stays(run_folder):
    import matplotlib
    report(run_folder)
    expected = drawn(run_folder)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red"}):
        report(run_folder)
        assert matplotlib.rcParams["text.usetex"]
    assert drawn(run_folder) == expected


# ---------------------------------------------------------------- one date for chat templates
SAYS = SLOW.replace("time.sleep(120)", """import os
    from core.records import write_text
    write_text(args.out, os.environ["ILR_DATE"])""").replace(
        'p.add_argument("--out")', 'p.add_argument("--out"); p.add_argument("--chat-template", '
        'action="store_true")')
DATED = HEAD + """
stage plain says.py --out "$OUT/seed_0/x/plain"
stage chat says.py --out "$OUT/seed_0/x/chat" --chat-template
run_plan
"""


def test_chat_templates_get_one_date_on_all_days_of_a_run(house):
    (house / "says.py").write_text(SAYS)
    (house / "small.sh").write_text(DATED)
    given, chat = dict(CHAT_TEMPLATE=1), house / "runs/a/seed_0/x/chat"

    def start(**more):
        done = call(house, "gsm8k", **{**given, **more})
        assert done.returncode == 0, done.stderr
        return said(done)
    start(ILR_DATE="2001-02-03")
    assert chat.read_text() == "2001-02-03"
    assert set(start().values()) == {"complete"}        # on another day
    chat.unlink()
    assert start() == {"seed_0/plain": "complete", "seed_0/chat": "ran"}
    assert chat.read_text() == "2001-02-03"
    assert set(start(out="runs/b", FROM="runs/a").values()) == {"taken over from runs/a"}
    other = start(out="runs/c", FROM="runs/a", ILR_DATE="2002-02-03")
    assert other == {"seed_0/plain": "taken over from runs/a", "seed_0/chat": "ran"}
    refused = call(house, "gsm8k", **given, ILR_DATE="2002-02-03")
    assert refused.returncode == 2
    assert "ILR_DATE was '2001-02-03', is '2002-02-03'" in refused.stderr


def test_the_date_is_settled_at_the_first_start_and_only_for_chat_models(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("ILR_DATE", "")
    monkeypatch.setenv("CHAT_TEMPLATE", "0")
    settings.settle_date()
    assert os.environ["ILR_DATE"] == ""     # config.json of such a run is the same on every day
    monkeypatch.setenv("CHAT_TEMPLATE", "1")
    settings.settle_date()
    assert re.fullmatch("20[0-9]{2}-[0-9]{2}-[0-9]{2}", os.environ["ILR_DATE"])
    write_json(tmp_path / "config.json", {"settings": {"ILR_DATE": "2001-02-03"}})
    monkeypatch.setenv("ILR_DATE", "")
    settings.settle_date()
    assert os.environ["ILR_DATE"] == "2001-02-03"


# ---------------------------------------------------------------- copied, touched, moved
def test_copying_touching_and_moving_a_run_throws_no_work_away(made):
    top = made / "runs"
    for path in [*top.rglob("*"), *made.glob("core/*.py")]:
        os.utime(path, (0, 0))
    assert set(said(call(made)).values()) == {"complete"}
    shutil.copytree(top / "a", top / "copy of a")       # times are kept, as with cp -p
    assert set(said(call(made, out="runs/copy of a")).values()) == {"complete"}
    shutil.copytree(top / "a", made.parent / "b", copy_function=shutil.copyfile)     # or are not
    shutil.rmtree(top / "a")
    assert set(said(call(made, out=made.parent / "b")).values()) == {"complete"}


def test_a_project_that_was_moved_goes_on_with_its_runs(made):
    moved = made.rename(made.with_name("moved"))
    assert set(said(call(moved)).values()) == {"complete"}


def test_an_input_counts_by_content_wherever_it_lies(made):
    gold = made / "runs/a/seed_0/data/gt.jsonl"
    for name in ("one", "two"):
        (made.parent / name).mkdir()
        shutil.copyfile(gold, made.parent / name / "labels.jsonl")
    (made / "small.sh").write_text(HEAD + """
stage clean refine.py --method clean --labels "$WHERE/labels.jsonl" --task arithmetic \\
  --out "$OUT/seed_0/clean/labels.jsonl"
run_plan
""")
    assert said(call(made, out="runs/b", WHERE=made.parent / "one")) == {"seed_0/clean": "ran"}
    there = dict(out="runs/c", FROM="runs/b", WHERE=made.parent / "two")
    assert "taken over from runs/b" in call(made, "--dry-run", **there).stdout
    assert said(call(made, **there)) == {"seed_0/clean": "taken over from runs/b"}
    # the same size and time, and another content
    path = made.parent / "two/labels.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("#### ", "#### 1", 1).replace("A", "", 1))
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = call(made, **there)
    assert refused.returncode == 2 and "was made from other files" in refused.stderr
    done = call(made, **{**there, "out": "runs/d"})
    assert "seed_0/clean is not taken over: " in done.stdout


# ---------------------------------------------------------------- embedders
def save_embedder(folder, family, tokenizer, **more):
    """A random tiny model of a family with a tokenizer that knows no length."""
    import torch
    from transformers import AutoConfig, AutoModel
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **more)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**about, "model_max_length": int(1e30)})


ENCODER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
FAMILIES = {
    "bert": (dict(**ENCODER, max_position_embeddings=20), 20),
    # its positions begin at 2
    "roberta": (dict(**ENCODER, max_position_embeddings=20, pad_token_id=1), 18),
    "mpnet": (dict(**ENCODER, max_position_embeddings=20, pad_token_id=1), 18),
    "gpt2": (dict(n_embd=16, n_layer=1, n_head=2, n_positions=20), 20),
    "opt": (dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
                 num_attention_heads=2, max_position_embeddings=20), 20),
    "bart": (dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                  decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                  max_position_embeddings=20), 20),
    "t5": (dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2), 1024),     # no limit
    "modernbert": (dict(**ENCODER, max_position_embeddings=20, pad_token_id=0, cls_token_id=1,
                        sep_token_id=2, bos_token_id=1, eos_token_id=2), 20)}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedder_reads_as_many_tokens_as_it_has_positions(family, tokenizer, tmp_path):
    more, limit = FAMILIES[family]
    save_embedder(tmp_path, family, tokenizer, **more)
    long = "1 + 2 = 3 " * 400
    ids = tokenizer(long).input_ids
    assert len(ids) > 1024
    same = tokenizer.decode(ids[:limit - 1])    # and another token, if any is read behind
    found = embeddings.embed(str(tmp_path), [long, long + "9", same, "", "7"], "cpu")
    assert all(v.isfinite().all() and v.shape == (16,) for v in found.values())
    assert found[long].equal(found[long + "9"])
    assert not found[long].allclose(found["7"]) and not found[long].equal(found[same])


def test_an_embedder_without_padding_and_end(tokenizer, tmp_path):
    import copy
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    save_embedder(tmp_path, "gpt2", bare, n_embd=16, n_layer=1, n_head=2, n_positions=20)
    texts = ["1 + 2", "7", ""]
    together = embeddings.embed(str(tmp_path), texts, "cpu")
    for text in texts:      # padding changes the order of fp32 sums only
        alone = embeddings.embed(str(tmp_path), [text], "cpu")[text]
        assert alone.isfinite().all() and alone.allclose(together[text], atol=1e-5)


def test_an_embedder_whose_folder_holds_only_the_encoder(tokenizer, tmp_path):
    """As sentence-transformers' T5 models are kept."""
    from transformers import T5Config, T5EncoderModel
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1,
                      num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert embeddings.embed(str(tmp_path), ["7"], "cpu")["7"].shape == (16,)


def test_an_embedder_with_another_models_tokenizer_is_refused(tokenizer, tmp_path):
    save_embedder(tmp_path, "bert", tokenizer, **FAMILIES["bert"][0])
    bigger = type(tokenizer).from_pretrained(tmp_path)
    bigger.add_tokens(["<new>"])
    bigger.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="do not belong together"):
        embeddings.embed(str(tmp_path), ["<new>"], "cpu")


# ---------------------------------------------------------------- metrics
@pytest.mark.parametrize("value, kept", [
    (1.23456789e-9, 1.234568e-9), (0.1 + 0.2, 0.3), (123.456789, 123.4568), (1e-7, 1e-7),
    (0.0, 0.0), (float("nan"), None), (float("inf"), None), (3, 3), (True, True)])
def test_metrics_keep_seven_digits(value, kept):
    assert significant(value) == kept
    assert "NaN" not in json.dumps(significant(value))


def test_a_small_learning_rate_is_no_zero_in_the_metrics(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems)
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "m",
        "--lr", 3e-8, "--batch-size", 10)
    log = rows(tmp_path / "m/metrics.jsonl")
    assert max(r["lr"] for r in log) == 3e-8 and min(r["lr"] for r in log) > 0


# ---------------------------------------------------------------- nothing was learnt
def test_answers_that_cannot_be_parsed_are_said_and_refused(problems, tmp_path, capsys):
    answers = [{**p, "completion": "" if i < 5 else "so it is", "truncated": i > 11}
               for i, p in enumerate(problems)]
    write_jsonl(tmp_path / "a.jsonl", answers)
    argv = ["grade", "--task", "arithmetic", "--data", tmp_path / "a.jsonl", "--out",
            tmp_path / "g.jsonl"]
    cause = ("none of the 20 answers can be parsed by task arithmetic: the model has not learnt "
             "the format, or has lost it; 5 of 20 are empty; 8 of 20 are cut off, see "
             "--max-new-tokens")
    with pytest.raises(InputError, match=re.escape(cause)) as e:
        run(evaluate, *argv, "--refuse-unparsed")
    assert "\n" not in str(e.value) and not (tmp_path / "g.jsonl").exists()
    run(evaluate, *argv)
    note, line = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and cause in note and "accuracy 0.0% of 20" in line
    answers[0]["completion"] = "#### -1"        # wrong, and an answer
    write_jsonl(tmp_path / "a.jsonl", answers)
    (tmp_path / "g.jsonl").unlink()
    run(evaluate, *argv, "--refuse-unparsed")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("given, begins", [
    ({}, ["sft/eval_1.jsonl", "weak/eval_1.jsonl", "weak/labels.jsonl"]),
    ({"LABEL_NOISE": 0.2}, ["sft/eval_1.jsonl"])])       # then the weak model's are not used
def test_a_run_stops_where_what_all_methods_begin_with_is_no_answer(given, begins, tmp_path):
    plan = kill_test.call(tmp_path / "run", ROOT / "bases", "--dry-run", ROUNDS=1, **given)
    strict = [line.split("--data ")[1].split()[0].partition("seed_0/")[2]
              for line in plan.stdout.splitlines() if "--refuse-unparsed" in line]
    assert sorted(strict) == begins


def test_labels_that_cannot_be_parsed_end_a_training_with_the_cause(problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{**p, "completion": "so it is"} for p in problems])
    with pytest.raises(InputError, match="the model has not learnt the format") as e:
        run(sft, "--model", "none", "--task", "arithmetic", "--data", tmp_path / "d.jsonl", "--out",
            tmp_path / "m")
    assert "\n" not in str(e.value) and "lower --lr" not in str(e.value)


def judge_samples(folder, problems, completion):
    write_jsonl(folder / "gold.jsonl", problems)
    write_jsonl(folder / "s.jsonl", [{**p, "completion": completion(p), "sample": 0}
                                     for p in problems])
    return ["train", "--model", "none", "--task", "arithmetic", "--gold", folder / "gold.jsonl",
            "--data", folder / "s.jsonl", "--out", folder / "judge"]


@pytest.mark.parametrize("completion, cause", [
    (lambda p: "so it is", "none of the 20 answers can be parsed by task arithmetic"),
    (lambda p: p["completion"], "all 20 samples are right: there is no wrong answer to learn")])
def test_a_judge_that_has_nothing_to_learn_from_says_why(completion, cause, problems, tmp_path):
    with pytest.raises(InputError, match=cause) as e:
        run(compare, *judge_samples(tmp_path, problems, completion))
    assert "too few for three splits" in str(e.value) and "\n" not in str(e.value)
    assert "lower --lr" not in str(e.value)


def test_what_samples_teach_a_judge(problems):
    right, wrong = list(problems), [{**problems[0], "completion": "#### -1"}]
    assert "are right: there is no wrong answer" in why_no_pairs("arithmetic", [right, right])
    assert why_no_pairs("arithmetic", [right, wrong]) == why_no_pairs("arithmetic", [wrong]) == ""


def comparison(k, prob_b, agree=False):
    return {"id": k, "prompt": "p", "completion_a": "#### 1", "completion_b": "#### 2",
            "agree": agree, "prob_b_ab": prob_b, "prob_b_ba": prob_b, "prob_b": prob_b}


@pytest.mark.parametrize("pairs, cause", [
    ([comparison(k, None, True) for k in range(9)], "both completions are the same in all 9 pairs"),
    ([comparison(k, 0.5) for k in range(9)], "prefers neither side in any of the 9 pairs"),
    ([comparison(k, 0.9) for k in range(6)], "--max-replace 0.15 of 6 pairs is no whole pair")])
def test_no_pair_for_dpo_is_said_with_its_cause(pairs, cause, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", pairs)
    with pytest.raises(InputError, match=cause):
        run(refine, "--method", "pairs", "--task", "arithmetic", "--comparisons",
            tmp_path / "c.jsonl", "--out", tmp_path / "p.jsonl")


@pytest.mark.parametrize("prob_b, why", [(None, "every proposal agrees with its label"),
                                         (0.4, "the judge prefers none of the proposals")])
def test_no_label_replaced_is_said_with_its_cause(prob_b, why, tmp_path, capsys):
    write_jsonl(tmp_path / "l.jsonl", [{"id": k, "prompt": "p", "completion": "#### 1"}
                                       for k in range(9)])
    write_jsonl(tmp_path / "c.jsonl", [comparison(k, prob_b, prob_b is None) for k in range(9)])
    run(refine, "--task", "arithmetic", "--labels", tmp_path / "l.jsonl", "--comparisons",
        tmp_path / "c.jsonl", "--out", tmp_path / "n.jsonl")
    note, line = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and why in note and "0 of 9 labels replaced" in line


@pytest.mark.parametrize("completion, cause", [
    ("so it is", "none of the 280 answers can be parsed by task arithmetic"),
    ("#### 1", "its answers can be parsed, and all of them are wrong")])
def test_a_report_of_zeros_says_so_in_its_first_line(completion, cause, run_folder, capsys):
    shutil.rmtree(run_folder / "seed_1")
    for path in run_folder.rglob("*.graded.jsonl"):
        write_jsonl(path, [{**r, "completion": completion, "correct": 0.0} for r in rows(path)])
    first, *_, = report(run_folder).splitlines()
    assert first == "# arithmetic: nothing was learnt, the accuracy is 0 everywhere"
    assert cause in report(run_folder).split("\n## ")[0]
    console = capsys.readouterr().out
    assert console.startswith("note: the accuracy is 0 everywhere: ") and cause in console


@pytest.mark.parametrize("right", [0, 20])
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_report_of_all_wrong_or_all_right_is_drawn(right, seeds, run_folder):
    for seed in range(seeds, 2):
        shutil.rmtree(run_folder / f"seed_{seed}")
    for path in run_folder.rglob("*.graded.jsonl"):
        graded(path, right)
    for path in run_folder.rglob("comparisons.jsonl.summary"):
        bins = [[None, None, 0]] * 9 + [[0.95, right / 20, 20]]
        write_json(path, {"pairs": 20, "asked": 20, "flip_rate": 0.0, "position_bias": 0.0,
                          "decisive": 20, "accuracy": right / 20, "calibration": bins})
    text = report(run_folder)
    assert "nan" not in text.lower().replace("finance", "") and "inf " not in text
    assert table_row(text, "ILR")[-1].startswith(f"{5 * right:.1f}")
    assert {p.name for p in run_folder.glob("*.png")} == {
        "test_accuracy.png", "label_accuracy.png", "price.png", "judge.png", "lengths.png"}


def test_a_report_before_the_first_round_has_the_row_of_sft(run_folder):
    for seed in (0, 1):
        for point in ("ilr_1", "ilr_2", "dpo_1", "dpo_2", "gold", "judge"):
            shutil.rmtree(run_folder / f"seed_{seed}" / point)
    (run_folder / "seed_0/sft/eval_old.graded.jsonl").write_text("{}\n")    # somebody's copy
    text = report(run_folder)
    assert table_row(text, "SFT") == ["47.5 ± 31.8"]
    assert table_row(text, "first labels") == ["50.0 ± 0.0"]
    assert "None: of two points that are compared, this run has at most one." in text


def test_a_report_of_naive_alone_has_no_row_of_ilr(run_folder):
    for seed in (0, 1):
        at = run_folder / f"seed_{seed}"
        for point in ("ilr_2", "dpo_1", "dpo_2"):
            shutil.rmtree(at / point)
        (at / "ilr_1").rename(at / "naive_1")
    text = report(run_folder)
    assert table_row(text, "naive") == ["47.5 ± 31.8", "57.5 ± 31.8"]
    assert table_row(text, "naive's labels") == ["50.0 ± 0.0", "60.0 ± 0.0"]
    assert "| ILR" not in text and table_row(text, "0") == ["50.0", "20.0", "20.0"]


# ---------------------------------------------------------------- locales, folders, interpreters
POOR = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii", "TZ": "Nowhere/None", "COLUMNS": "20", "NO_COLOR": "1",
        "PYTHONOPTIMIZE": "1", "PYTHONHASHSEED": "1", "TMPDIR": "/nowhere", "TERM": "dumb"}


def test_a_stage_speaks_in_any_locale(problems, tmp_path):
    data = tmp_path / "données «1»" / "é.jsonl"
    write_jsonl(data, [{**p, "category": "größe"} for p in problems])
    done = subprocess.run([sys.executable, "evaluate.py", "grade", "--task", "arithmetic", "--data",
                           data], cwd=ROOT, capture_output=True,
                          env={"PATH": os.environ["PATH"], **POOR})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"accuracy 100.0% of 20" in done.stdout


def test_an_interpreter_without_docstrings_is_refused_and_none_of_a_run(problems, house, tmp_path):
    """transformers cannot be imported there."""
    write_jsonl(tmp_path / "d.jsonl", problems)
    done = subprocess.run([sys.executable, "sft.py", "--model", "m", "--data", tmp_path / "d.jsonl",
                           "--out", tmp_path / "m"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert done.returncode == 2 and done.stderr.startswith("sft.py: error: PYTHONOPTIMIZE=2 ")
    assert set(said(call(house, PYTHONOPTIMIZE=2)).values()) == {"ran"}


@pytest.mark.parametrize("out", ["-runs/a", "rüns/it's \"a\" [b] $x", "runs/a b"])
def test_a_project_and_a_run_may_lie_in_any_folder(out, tmp_path):
    top = tmp_path / "-é 'q' [x] $HOME"
    top.mkdir()
    at = house_in(top)
    shutil.copytree(ROOT / "bases", at / "bases")
    (at / "small.sh").write_text(HEAD + """
stage data tasks/arithmetic.py --out "$data" --train 40 --gt 20 --test 10 --seed 0
stage clean refine.py --method clean --labels "$data/unlab.jsonl" --task arithmetic \\
  --out "$OUT/seed_0/clean/labels.jsonl"
run_plan
""")
    assert set(said(call(at, out=out, **POOR)).values()) == {"ran"}
    assert set(said(call(at, out=out)).values()) == {"complete"}
    assert "clean" in {p.name for p in (at / out / "seed_0").iterdir()}
    plan = call(at, "--dry-run", script="run_ilr.sh", out=f"{out} 2", ROUNDS=1)
    assert (plan.returncode, plan.stderr) == (0, "")


def test_python3_alone_is_enough(house, tmp_path):
    """Where no `python` is installed; and no git, and no home."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sed", "nice", "dirname", "cksum", "tr", "env"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python3").chmod(0o755)
    done = subprocess.run([tools / "bash", "small.sh"], cwd=house, capture_output=True, text=True,
                          env={"PATH": str(tools), "OUT": "runs/a", "BASES": "bases"})
    assert (done.returncode, done.stderr) == (0, "")
    assert set(said(done).values()) == {"ran"}
    config = json.loads((house / "runs/a/config.json").read_text())
    assert config["commit"] is None and everything(house / "runs/a/seed_0")
