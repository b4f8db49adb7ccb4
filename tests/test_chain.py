"""The whole chain by run_ilr.sh, at a size that means nothing and takes a minute."""
import importlib
import json
import shlex
import shutil

import pytest
from conftest import everything, rows
from kill_test import TINY, call, contents, differences, finished_run

import baselines
from report.methods import METHODS

pytestmark = pytest.mark.slow
JUDGED_BY_REFERENCE = ("graded.jsonl", "summary", "report.json", "report.md", "report.html", ".png",
                       "stages.jsonl")
ALL = ["ilr", "dpo", "naive", *baselines.names()]


@pytest.fixture(scope="module")
def finished():
    return finished_run()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change, and the same base models."""
    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run", finished[1]


def report_of(out):
    return json.loads((out / "report.json").read_text())


# ---------------------------------------------------------------- what a run leaves
def test_every_file_is_there_and_none_is_half_written(finished):
    out, bases = finished
    report = (out / "report.md").read_text()
    assert "| ILR |" in report and "| DPO |" in report
    for figure in ("test_accuracy.png", "label_accuracy.png"):
        assert f"({figure})" in report and (out / figure).stat().st_size > 5000
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    numbers = report_of(out)
    assert set(numbers["tests"]) == {"weak", "gold", "sft", "ilr_1", "dpo_1"}
    assert numbers["n_test"] == TINY["TEST"]
    assert set(numbers["labels"]) == {"weak", "ilr_1"} and list(numbers["judges"]) == ["0"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["ALPHA"] == "0.15" and config["versions"]["torch"]
    assert config["settings"]["TRAIN"] == str(TINY["TRAIN"])
    litter = (".partial", ".partial.json", ".writing", ".pt")
    assert [p for top in finished for p in top.rglob("*") if p.name.endswith(litter)] == []
    run = out / "seed_0"
    for model in ("weak/model", "weak/model/checkpoint-30", "judge/model", "sft/model_1",
                  "gold/model_1", "ilr_1/half_1", "ilr_1/half_2", "ilr_1/model_1", "dpo_1/model_1"):
        names = {p.name for p in (run / model).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names, model
    assert {p.name for p in (run / "weak/model").glob("checkpoint-*")} == {
        f"checkpoint-{p}" for p in config["settings"]["CHECKPOINTS"].split()}
    for path in run.rglob("*.jsonl"):
        assert all(isinstance(row, dict) for row in rows(path)), path
        assert path.read_text().endswith("\n"), path
    unlab = [r["id"] for r in rows(run / "data/unlab.jsonl")]
    assert len(unlab) == TINY["TRAIN"] - TINY["GT"]
    for labels in ("weak/labels.jsonl", "ilr_1/labels.jsonl"):
        assert [r["id"] for r in rows(run / labels)] == unlab
    accepted = [r["accepted"] for r in rows(run / "ilr_1/labels.jsonl")]
    assert 0 < sum(accepted) < len(accepted)     # else the chain would show nothing of refinement


def test_a_second_call_changes_no_byte(finished):
    out, bases = finished
    before = [everything(top) for top in finished]
    again = call(out, bases, **TINY)
    assert again.returncode == 0, again.stderr
    after = [everything(top) for top in finished]
    assert [differences(a, b) for a, b in zip(before, after, strict=True)] == [[], []]
    *places, report = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert len(places) > 30 and all(line.endswith(": complete") for line in places)
    assert report.endswith(" report")


def test_another_setting_is_refused_by_name_and_more_rounds_are_not(copied):
    out, bases = copied
    before = everything(out)
    refused = call(out, bases, **{**TINY, "ALPHA": 0.3})
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "ALPHA was '0.15', is '0.3'" in refused.stderr and str(out) in refused.stderr
    assert differences(before, everything(out)) == []
    more = call(out, bases, **{**TINY, "METHODS": "ilr", "ROUNDS": 2, "RETRAINS": 2})
    assert more.returncode == 0, more.stdout + more.stderr
    found = report_of(out)["tests"]
    assert "ilr_2" in found and len(found["ilr_1"]["0"]) == 2
    now = {name: data for name, data in everything(out).items() if name in before}
    assert [n for n in differences(before, now) if n.startswith("seed_0/")] == []
    fewer = call(out, bases, **TINY)        # which takes nothing back
    assert fewer.returncode == 0, fewer.stderr
    kept = json.loads((out / "config.json").read_text())["settings"]
    assert (kept["ROUNDS"], kept["RETRAINS"], kept["METHODS"]) == ("2", "2", "ilr dpo")


def test_a_failed_stage_ends_the_run_and_says_which(copied):
    out, bases = copied
    for path in [*(out / "seed_0/dpo_1").iterdir(), *(out / "seed_0/sft").glob("eval*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "seed_0/sft/model_1/model.safetensors").write_bytes(b"broken")
    failed = call(out, bases, JOBS=1, **TINY)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 2
    assert "model_1: not a model folder" in failed.stderr
    assert "stage seed_0/sft/answer_1 failed (exit 2)" in failed.stderr
    assert not list((out / "seed_0/dpo_1").glob("[!.]*"))


def test_an_ablation_takes_over_what_it_leaves_unchanged(finished, tmp_path):
    """Another cap of ILR: its labels differ, and what follows from them; all else is taken over."""
    out, bases = finished
    done = call(tmp_path / "run", bases, **{**TINY, "ALPHA": 0.5, "FROM": out})
    assert done.returncode == 0, done.stdout + done.stderr
    places = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    ran = [line.removeprefix("seed_0/") for line in places if ": " not in line]
    assert ran == ["ilr_1/refine", *[r for r in ran if r.startswith("ilr_1/")][1:], "report"]
    assert set(ran) == {"ilr_1/refine", "ilr_1/grade_labels", "ilr_1/train_1", "ilr_1/answer_1",
                        "ilr_1/grade_1", "report"}
    assert ("note: seed_0/ilr_1/refine is not taken over: --max-replace was 0.15, is 0.5"
            in done.stdout)
    a, b = contents(out), contents(tmp_path / "run")
    changed = {n.split()[0] for n in differences(a, b)}
    assert all(n.startswith(("seed_0/ilr_1/", "report", "config")) or n.endswith(".png")
               for n in changed)
    assert "seed_0/ilr_1/labels.jsonl" in changed
    assert "seed_0/ilr_1/comparisons.jsonl" not in changed
    assert report_of(tmp_path / "run")["price"] and (tmp_path / "run/report.md").exists()


# ---------------------------------------------------------------- what a run may read
def test_scrambled_references_change_nothing(finished, tmp_path):
    """Everything from the weak labels on is made again, two stages at a time instead of four, with
    every reference of D_unlab wrong."""
    out, bases = finished
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns(
        "sft", "gold", "ilr_1", "dpo_1", "judge", "report*", "*.png", "labe*", "eval*"))
    unlab = tmp_path / "run/seed_0/data/unlab.jsonl"
    records = rows(unlab)
    wrong = [str(1000 + int(r["reference"])) for r in records[1:] + records[:1]]
    unlab.write_text("".join(json.dumps({**r, "reference": w}, ensure_ascii=False) + "\n"
                             for r, w in zip(records, wrong, strict=True)))
    done = call(tmp_path / "run", bases, **{**TINY, "JOBS": 2})
    assert done.returncode == 0, done.stdout + done.stderr
    # data and weak model: the rest is new
    assert done.stdout.count(": complete") == 2

    def unreferenced(top):
        files = contents(top, lambda p: not p.name.endswith(JUDGED_BY_REFERENCE))
        for name, data in files.items():
            if name.endswith(".jsonl"):
                found = [json.loads(line) for line in data.splitlines()]
                files[name] = [{k: v for k, v in r.items() if k != "reference"} for r in found]
        return files
    a, b = unreferenced(out), unreferenced(tmp_path / "run")
    assert differences(a, b) == []
    assert {"weak/labels.jsonl", "judge/model/model.safetensors", "ilr_1/model_1/model.safetensors",
            "ilr_1/comparisons.jsonl", "dpo_1/preferences.jsonl", "ilr_1/eval_1.jsonl",
            "dpo_1/model_1/model.safetensors"} <= {n.removeprefix("seed_0/") for n in a}
    # what does not come from D_unlab is the same to the last byte, two stages at a time and four
    whole, part = contents(out), contents(tmp_path / "run")
    apart = ("seed_0/judge/", "seed_0/weak/eval", "seed_0/gold/")
    same = [{n: d for n, d in files.items() if n.startswith(apart)} for files in (whole, part)]
    assert same[0] and differences(*same) == []
    # and the scrambling did reach what references are for
    assert whole["seed_0/weak/labels.graded.jsonl"] != part["seed_0/weak/labels.graded.jsonl"]


def test_supervision_quality_and_naive_ilr(finished, tmp_path):
    """JUDGE=oracle, CLEAN_START=1 and METHODS=naive on the weak side of the finished run, half of
    its labels made right."""
    out, run = tmp_path / "run", tmp_path / "run/seed_0"
    for part in ("data", "weak", "judge"):
        shutil.copytree(finished[0] / "seed_0" / part, run / part, symlinks=True)
    labels = [{**r, "completion": r["completion"] if i % 2 else "#### 1000"}
              for i, r in enumerate(rows(run / "data/unlab.jsonl"))]
    (run / "weak/labels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labels))
    settings = {"METHODS": "naive ilr", "JUDGE": "oracle", "CLEAN_START": 1}
    done = call(out, finished[1], **{**TINY, **settings})
    assert done.returncode == 0, done.stdout + done.stderr
    read = {p: rows(run / p / "labels.jsonl") for p in ("clean", "ilr_1", "naive_1")}
    assert read["clean"] == labels[1::2]
    assert all(not r["accepted"] for r in read["ilr_1"])     # nothing is better than right
    assert sum(r["accepted"] for r in read["naive_1"]) == len(labels) // 2 * 15 // 100
    assert not (run / "naive_1/comparisons.jsonl").exists()
    numbers = report_of(out)
    assert numbers["labels"]["clean"] == {"0": [1.0]}
    assert {"sft", "ilr_1", "naive_1"} <= set(numbers["tests"])
    report = (out / "report.md").read_text()
    assert "| naive's labels | 100.0 |" in report and "| ILR's labels | 100.0 | 100.0 |" in report


def test_every_method_runs_on_the_finished_run(copied):
    out, bases = copied
    done = call(out, bases, **{**TINY, "METHODS": " ".join(ALL)})
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = report_of(out)
    assert set(numbers["tests"]) == {"weak", "gold", "sft", *(f"{m}_1" for m in ALL)}
    run = out / "seed_0"
    assert all(len(rows(run / f"{m}_1/eval_1.jsonl")) == TINY["TEST"] for m in ALL)
    # what each point cost: models, generated files, judged pairs
    learned = json.loads((run / "sft/model_1/price.json").read_text())
    steps = rows(run / "sft/model_1/metrics.jsonl")
    assert learned["trained_tokens"] == sum(s["tokens"] for s in steps) > 1000
    assert learned["weights"] == learned["trained_weights"] > 100_000
    preferred = json.loads((run / "dpo_1/model_1/price.json").read_text())
    # DPO_EPOCHS=1: read once by the reference, trained on once
    assert preferred["read_tokens"] == preferred["trained_tokens"] > 0
    sampled, answered = (json.loads((run / f"{name}.jsonl.price").read_text())
                         for name in ("dpo_1/samples", "sft/eval_1"))
    assert sampled["generated_tokens"] > answered["generated_tokens"] > 0
    assert sampled["weights"] == learned["weights"]
    for name in ("ilr_1/comparisons.jsonl.summary", "judge/model/price.json"):
        assert json.loads((run / name).read_text())["read_tokens"] > 0
    # and the report finds all of it: no blank in the prices of any method
    prices = numbers["price"]
    assert set(prices) == {"weak", "judge", "sft", *(f"{m}_1" for m in ALL)}
    assert not any(None in row.values() for row in prices.values())
    text = (out / "report.md").read_text()
    for m in ALL:
        name = METHODS[m].NAME
        assert f"\n- {name}: " in text and f"\n| {name}, through round 1 | " in text
    asked = {m: prices[f"{m}_1"]["asked"] for m in ALL}
    assert asked["filter"] == asked["ilr"] == asked["dpo-labels"] > asked["spin"] == 0
    assert prices["sft-chosen_1"]["generated"] == prices["dpo_1"]["generated"]
    assert prices["ensemble_1"]["flops"] < prices["naive_1"]["flops"]


# ---------------------------------------------------------------- plans
def commands_of(done):
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("# ")]


def outs_of(words):
    """The values of --out."""
    first = words.index("--out") + 1 if "--out" in words else len(words)
    ends = [i for i in range(first, len(words)) if words[i].startswith("--")]
    return words[first:min(ends, default=len(words))]


def check_order(commands, folder):
    """What the commands write, in an order in which whatever one of them reads in `folder` was
    written before; and all their flags are ones that the stages have."""
    made = []
    for line in commands:
        words = shlex.split(line)
        script = words[1].removesuffix(".py")
        if script.startswith("baselines/"):
            baselines.parser(script.partition("/")[2].replace("_", "-")).parse_args(words[2:])
        else:
            stage = importlib.import_module(script.replace("/", "."))
            stage.parser().parse_args(words[2:])
        outs = outs_of(words)
        folders = [words[i + 1] for i, word in enumerate(words) if word in ("--run", "report")]
        for word in words:
            if word.startswith(str(folder)) and word not in (*outs, *folders):
                assert any(word == path or word.startswith(path + "/") for path in made), line
        made += outs
    return made


@pytest.mark.parametrize("preset", ["gsm8k", "bird", "saferpaca", "gsm8k-70b"])
@pytest.mark.parametrize("settings", [
    {}, {"LORA_RANK": 64, "LOAD_IN_4BIT": 1, "CHAT_TEMPLATE": 1},
    {"JUDGE": "http://h/v1", "JUDGE_MODEL": "small"},
    {"JUDGE": "human", "CLEAN_START": 1, "METHODS": "naive ilr", "ROUNDS": 6},
    {"LABEL_NOISE": 0.2}], ids=["", "4bit", "url", "human", "noise"])
def test_dry_run_of_every_preset(preset, settings, tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", **settings)
    commands = commands_of(done)
    assert list(tmp_path.iterdir()) == []
    made = check_order(commands, tmp_path)
    at, rounds = tmp_path / "run/seed_0", settings.get("ROUNDS", 3)
    assert {f"{at}/sft/model_1", f"{at}/gold/model_1",
            *(f"{at}/ilr_{k}/model_1" for k in range(1, rounds + 1))} <= set(made)
    assert (f"{at}/judge/model" in made) == ("JUDGE" not in settings)
    assert (f"{at}/dpo_3/model_1" in made) == ("METHODS" not in settings)
    compared = [c for c in commands if " compare.py score" in c]
    assert compared and all(f"--judge {settings['JUDGE']} " in c for c in compared
                            if "JUDGE" in settings)
    assert all(("--embedder" in c) == (preset == "saferpaca") for c in compared)
    assert all(("--judge-model small" in c) == ("JUDGE_MODEL" in settings) for c in compared)
    weak, strong = "google/gemma-2b", "mistralai/Mistral-7B-v0.1"
    if preset == "gsm8k-70b":
        weak = strong
    if preset in ("bird", "gsm8k-70b"):
        strong = "meta-llama/Meta-Llama-3-70B"
    weak, strong = ([c for c in commands if f"sft.py --model {m} " in c] for m in (weak, strong))
    # 70B fits one GPU in 4 bits only
    small = preset in ("bird", "gsm8k-70b") or "LOAD_IN_4BIT" in settings
    assert weak and strong and all("--load-in-4bit" not in c for c in weak)
    assert all(("--load-in-4bit" in c) == small for c in strong)
    for command in (c for c in commands if " generate.py" in c):
        models = command.split("--data")[0]
        by_weak = "/weak/" in models or "/judge/" in models
        assert ("--load-in-4bit" in command) == (small and not by_weak)
    for script in ("sft.py", "generate.py", "dpo.py", "compare.py"):
        assert all(("--chat-template" in c) == ("CHAT_TEMPLATE" in settings)
                   for c in commands if f" {script} " in c)
    labelled = [c for c in commands if "--source weak" in c or "--source proposal" in c]
    assert all(("--temperature 1.0" in c) == (preset == "saferpaca") for c in labelled)
    grades = any("evaluate.py grade" in c and "labels" in c for c in commands)
    assert grades == (preset != "saferpaca")


@pytest.mark.parametrize("preset", ["arithmetic", "gsm8k"])
def test_every_method_is_made_in_an_order_that_works(preset, tmp_path):
    """Whatever the order of METHODS; one stage after the other (JOBS=1) takes the same order."""
    done = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", ROUNDS=2,
                METHODS=" ".join(reversed(ALL)))
    made = check_order(commands_of(done), tmp_path)
    at = tmp_path / "run/seed_0"
    answers = {f"{at}/{m}_{k}/eval_1.jsonl" for m in ALL for k in (1, 2)
               if m != "ensemble" or k == 1}
    assert answers <= set(made)
    refused = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", METHODS="dpo rft")
    assert refused.returncode == 2
    assert refused.stderr == "run_ilr.sh: error: METHODS: rft needs ilr beside it\n"


def test_any_file_of_tasks_is_a_task_of_run_ilr(tmp_path):
    """A task without a preset gets presets/generic.sh."""
    from test_stages import house_in
    house = house_in(tmp_path)
    shutil.copy(house / "tasks/arithmetic.py", house / "tasks/mine.py")
    done = call("runs/x", "bases", "mine", "--dry-run", root=house)
    commands = commands_of(done)
    assert commands[0].split()[1:4] == ["tasks/mine.py", "--out", "runs/x/seed_0/data"]
    assert all("--task mine" in c for c in commands if " evaluate.py grade" in c)


@pytest.mark.parametrize("settings, flags", [
    ({}, "--loss sigmoid --nll-weight 0 --lr"),
    ({"DPO_LOSS": "rdpo", "BETA": 0.2}, "--loss rdpo --beta 0.2 --nll-weight 0 --lr"),
    ({"DPO_LOSS": "simpo", "DPO_FLAGS": "--gamma 1.6"}, "--loss simpo --nll-weight 0 --lr"),
    ({"DPO_LOSS": "asft", "DPO_NLL": 0.5, "JUDGE": "oracle"}, "--loss asft --nll-weight 0.5 --lr")],
    ids=["", "rdpo", "simpo", "asft"])
def test_another_preference_loss(settings, flags, tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", "--dry-run", SEEDS="0 1", **settings)
    commands = commands_of(done)
    check_order(commands, tmp_path)
    for seed in (0, 1):
        judge = tmp_path / f"run/seed_{seed}/judge/model"
        trained = [c for c in commands if " dpo.py " in c and f"seed_{seed}/" in c]
        assert len(trained) == 3 and all(flags in c for c in trained)
        assert all((f"--judge {judge}" in c) == ("JUDGE" not in settings) for c in trained)
        assert all(settings.get("DPO_FLAGS", "") in c for c in trained)


def test_a_simulated_judge_is_told_how_often_it_errs(tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", "--dry-run", SEEDS="0 1", JUDGE="simulated",
                JUDGE_ACCURACY=0.7)
    commands = commands_of(done)
    check_order(commands, tmp_path)
    for seed in (0, 1):
        asked = [c for c in commands if " compare.py " in c and f"seed_{seed}/" in c]
        assert len(asked) == 6      # of ILR and DPO
        assert all("score --judge simulated " in c and f"--judge-accuracy 0.7 --seed {seed} " in c
                   for c in asked)


@pytest.mark.parametrize("settings", [
    {"JUDGE": "oracle"}, {"JUDGE": "simulated"}, {"JUDGE": "human"},
    {"JUDGE": "http://h/v1", "JUDGE_MODEL": "m"}, {"JUDGE_FLIPS": 0.1}, {"METHODS": "spin"},
    {"METHODS": "ilr dpo-coin"}],
    ids=["oracle", "simulated", "human", "url", "flips", "spin", "coin"])
def test_losses_that_know_the_judges_errors_need_a_judge_whose_errors_are_known(settings, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", DPO_LOSS="rdpo", **settings)
    assert refused.returncode == 2 and list(tmp_path.iterdir()) == []
    assert len(refused.stderr.splitlines()) == 1
    assert "dpo.py: --loss rdpo needs a noise rate" in refused.stderr
    given = call(tmp_path / "run", tmp_path / "bases", "--dry-run", DPO_LOSS="rdpo",
                 DPO_FLAGS="--noise 0.2", **settings)
    assert given.returncode == 0, given.stderr


def test_help_and_dry_run_leave_nothing_behind(tmp_path):
    out, bases = tmp_path / "run", tmp_path / "bases"
    shown = call(out, bases, "--help", **TINY)
    assert shown.returncode == 0 and "ALPHA" in shown.stdout and "0.15" in shown.stdout
    assert str(out) in shown.stdout
    dry = call(out, bases, "--dry-run", **{**TINY, "ROUNDS": 2, "SEEDS": "0 1"})
    assert dry.returncode == 0 and not out.exists() and not bases.exists()
    lines = dry.stdout.splitlines()
    assert all(line.startswith(f"# [{k + 1}/") for k, line in enumerate(lines[0::2]))
    made = check_order(lines[1::2], tmp_path)
    assert {f"{out}/seed_{s}/{m}_{k}/model_1" for s in (0, 1) for m in ("ilr", "dpo")
            for k in (1, 2)} <= set(made)
    for word in ("--dry-nun", "nothing"):
        assert call(out, bases, word).returncode == 2 and not out.exists()


def test_two_runs_in_one_folder_are_refused(copied):
    import fcntl
    out, bases = copied
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(out, bases, **TINY)
    assert refused.returncode == 1 and "is in use" in refused.stderr and refused.stdout == ""
