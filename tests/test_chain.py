"""The whole chain by run_ilr.sh, at a size that means nothing and takes a minute."""
import importlib
import json
import shlex
import shutil

import pytest

from kill_test import TINY, call, contents, differences, finished_run
from tasks._methods import METHODS

JUDGED_BY_REFERENCE = ("graded.jsonl", "summary", "report.json", "report.md", "report.html", ".png")


@pytest.fixture(scope="module")
def finished():
    return finished_run()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change, and the same base models."""
    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run", finished[1]


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_file_is_there_and_none_is_half_written(finished):
    out, bases = finished
    report = (out / "report.md").read_text()
    assert "| ILR |" in report and "| DPO |" in report and "(test_accuracy.png)" in report and "(label_accuracy.png)" in report
    for figure in ("test_accuracy.png", "label_accuracy.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG") and (out / figure).stat().st_size > 5000
    numbers = json.loads((out / "report.json").read_text())
    assert set(numbers["tests"]) == {"weak", "gold", "sft", "ilr_1", "dpo_1"} and numbers["n_test"] == TINY["TEST"]
    assert set(numbers["labels"]) == {"weak", "ilr_1"} and list(numbers["judges"]) == ["0"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["ALPHA"] == "0.15" and config["settings"]["TRAIN"] == str(TINY["TRAIN"]) and config["code"]
    litter = (".partial", ".writing", ".pt", ".out", ".err")
    assert [p for top in finished for p in top.rglob("*") if p.name.endswith(litter)] == []
    run = out / "seed_0"
    for model in ("weak/model", "weak/model/checkpoint-10", "judge/model", "sft/model_1", "gold/model_1", "ilr_1/half_1",
                  "ilr_1/half_2", "ilr_1/model_1", "dpo_1/model_1"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (run / model).iterdir()}, model
    for path in run.rglob("*.jsonl"):
        text = path.read_text()
        assert text.endswith("\n") and all(isinstance(json.loads(line), dict) for line in text.splitlines()), path
    unlab = [json.loads(line)["id"] for line in (run / "data/unlab.jsonl").open()]
    for labels in ("weak/labels.jsonl", "ilr_1/labels.jsonl"):
        assert [json.loads(line)["id"] for line in (run / labels).open()] == unlab and len(unlab) == TINY["TRAIN"] - TINY["GT"]
    refined = [json.loads(line) for line in (run / "ilr_1/labels.jsonl").open()]
    assert 0 < sum(r["accepted"] for r in refined) < len(refined)     # else the chain would show nothing of refinement


def test_a_second_call_changes_no_byte(finished):
    out, bases = finished
    before = [everything(top) for top in finished]
    again = call(out, bases, **TINY)
    assert again.returncode == 0, again.stderr
    after = [everything(top) for top in finished]
    for folder in (*before, *after):
        folder.pop(".progress", None)      # the order in which two lanes said where they are
    assert [differences(a, b) for a, b in zip(before, after)] == [[], []]
    places = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert len(places) > 30 and all(line.endswith(": complete") for line in places)


def test_another_setting_is_refused_by_name_and_more_rounds_are_not(copied):
    out, bases = copied
    before = everything(out)
    refused = call(out, bases, **{**TINY, "ALPHA": 0.3})
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "ALPHA was '0.15', is '0.3'" in refused.stderr and str(out) in refused.stderr
    assert differences(before, everything(out)) == []
    more = call(out, bases, **{**TINY, "METHODS": "ilr", "ROUNDS": 2})
    assert more.returncode == 0, more.stdout + more.stderr
    assert "ilr_2" in json.loads((out / "report.json").read_text())["tests"]
    now = everything(out)
    assert [n for n in differences(before, {k: v for k, v in now.items() if k in before})
            if n.split()[0].startswith("seed_0/")] == []


def test_a_failed_stage_ends_the_run_and_says_which(copied):
    out, bases = copied
    shutil.rmtree(out / "seed_0/dpo_1")
    (out / "seed_0/sft/model_1/model.safetensors").write_bytes(b"broken")
    failed = call(out, bases, **TINY)
    assert failed.returncode != 0 and "Traceback" not in failed.stderr
    assert "model_1: not a model folder" in failed.stderr and "stage seed_0/dpo_1/sample failed (exit 2)" in failed.stderr
    assert not list((out / "seed_0/dpo_1").glob("*"))


def test_scrambled_references_and_one_job_change_nothing(finished, tmp_path):
    """Everything from the weak labels on is made again, one stage after the other, with every reference of D_unlab wrong."""
    out, bases = finished
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns(
        "sft", "gold", "ilr_1", "dpo_1", "judge", "report*", "*.png", "labe*", "eval*"))
    unlab = tmp_path / "run/seed_0/data/unlab.jsonl"
    records = [json.loads(line) for line in unlab.open()]
    wrong = [str(1000 + int(r["reference"])) for r in records[1:] + records[:1]]
    unlab.write_text("".join(json.dumps({**r, "reference": w}, ensure_ascii=False) + "\n" for r, w in zip(records, wrong)))
    done = call(tmp_path / "run", bases, **{**TINY, "JOBS": 1})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": complete") == 5     # corpora, two base models, data, weak model: the rest is new

    def unreferenced(top):
        files = contents(top, lambda p: not p.name.endswith(JUDGED_BY_REFERENCE))
        return {name: [{k: v for k, v in json.loads(line).items() if k != "reference"} for line in data.splitlines()]
                if name.endswith(".jsonl") else data for name, data in files.items()}
    a, b = unreferenced(out), unreferenced(tmp_path / "run")
    assert differences(a, b) == []
    assert {"seed_0/weak/labels.jsonl", "seed_0/judge/model/model.safetensors", "seed_0/ilr_1/model_1/model.safetensors",
            "seed_0/ilr_1/comparisons.jsonl", "seed_0/dpo_1/preferences.jsonl", "seed_0/dpo_1/model_1/model.safetensors",
            "seed_0/ilr_1/eval_1.jsonl"} <= set(a)
    # what does not come from D_unlab is the same to the last byte, with one job and with two
    same = [{n: d for n, d in contents(top).items() if n.startswith(("seed_0/judge/", "seed_0/weak/eval", "seed_0/gold/"))}
            for top in (out, tmp_path / "run")]
    assert same[0] and differences(*same) == []
    # and the scrambling did reach what references are for
    assert contents(out)["seed_0/weak/labels.graded.jsonl"] != contents(tmp_path / "run")["seed_0/weak/labels.graded.jsonl"]


def test_supervision_quality_and_naive_ilr(finished, tmp_path):
    """JUDGE=oracle, CLEAN_START=1 and METHODS=naive on the weak side of the finished run, half of its labels made right."""
    out, run = tmp_path / "run", tmp_path / "run/seed_0"
    for part in ("data", "weak", "judge"):
        shutil.copytree(finished[0] / "seed_0" / part, run / part, symlinks=True)
    gold = [json.loads(line) for line in (run / "data/unlab.jsonl").open()]
    labels = [{**r, "completion": r["completion"] if i % 2 else "#### 1000"} for i, r in enumerate(gold)]
    (run / "weak/labels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labels))
    done = call(out, finished[1], **{**TINY, "METHODS": "naive ilr", "JUDGE": "oracle", "CLEAN_START": 1})
    assert done.returncode == 0, done.stdout + done.stderr
    read = {p: [json.loads(line) for line in (run / p / "labels.jsonl").open()] for p in ("clean", "ilr_1", "naive_1")}
    assert read["clean"] == labels[1::2] and all(not r["accepted"] for r in read["ilr_1"])     # nothing is better than right
    assert sum(r["accepted"] for r in read["naive_1"]) == len(labels) // 2 * 15 // 100 and not (run / "naive_1/comparisons.jsonl").exists()
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["labels"]["clean"] == {"0": [1.0]} and {"sft", "ilr_1", "naive_1"} <= set(numbers["tests"])
    report = (out / "report.md").read_text()
    assert "| naive's labels | 100.0 |" in report and "| ILR's labels | 100.0 | 100.0 |" in report


def test_every_baseline_runs_on_the_finished_run(copied):
    out, bases = copied
    done = call(out, bases, **{**TINY, "METHODS": ALL})
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((out / "report.json").read_text())
    assert set(numbers["tests"]) == {"weak", "gold", "sft", *(f"{m}_1" for m in ALL.split())}
    run = out / "seed_0"
    assert all(len((run / f"{m}_1/eval_1.jsonl").read_text().splitlines()) == TINY["TEST"] for m in ALL.split())
    # what each point cost: models, generated files, judged pairs
    learned = json.loads((run / "sft/model_1/price.json").read_text())
    steps = [json.loads(line) for line in (run / "sft/model_1/metrics.jsonl").open()]
    assert learned["trained_tokens"] == sum(s["tokens"] for s in steps) > 1000 and learned["weights"] == learned["trained_weights"] > 100_000
    preferred = json.loads((run / "dpo_1/model_1/price.json").read_text())
    assert preferred["read_tokens"] == preferred["trained_tokens"] > 0          # DPO_EPOCHS=1: read once by the reference, trained on once
    sampled, answered = (json.loads((run / f"{name}.jsonl.price").read_text()) for name in ("dpo_1/samples", "sft/eval_1"))
    assert sampled["generated_tokens"] > answered["generated_tokens"] > 0 and sampled["weights"] == learned["weights"]
    assert json.loads((run / "ilr_1/comparisons.jsonl.summary").read_text())["read_tokens"] > 0
    assert json.loads((run / "judge/model/price.json").read_text())["read_tokens"] > 0
    # and the report finds all of it: no blank in the prices of any method
    prices = numbers["price"]
    assert set(prices) == {"weak", "judge", "sft", *(f"{m}_1" for m in ALL.split())} and not any(None in row.values() for row in prices.values())
    text = (out / "report.md").read_text()
    assert all(f"\n- {METHODS[m][0]}: " in text and f"\n| {METHODS[m][0]}, through round 1 | " in text for m in ALL.split())
    assert prices["filter_1"]["asked"] == prices["ilr_1"]["asked"] == prices["dpo-labels_1"]["asked"] > prices["spin_1"]["asked"] == 0
    assert prices["sft-chosen_1"]["generated"] == prices["dpo_1"]["generated"] and prices["ensemble_1"]["flops"] < prices["naive_1"]["flops"]


def check_order(commands, folder):
    """What the commands write, in an order in which whatever one of them reads in `folder` was written before; and all their
    flags are ones that the stages have."""
    made = []
    for line in commands:
        words = shlex.split(line)
        stage = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        stage.parser().parse_args(words[2:])
        first = words.index("--out") + 1
        outs = words[first:next((i for i in range(first, len(words)) if words[i].startswith("--")), len(words))]
        for word in words:
            if word.startswith(str(folder)) and word not in outs:
                assert any(word == path or word.startswith(path + "/") for path in made), line
        made += outs
    return made


@pytest.mark.parametrize("preset", ["gsm8k", "bird", "saferpaca", "gsm8k-70b"])
@pytest.mark.parametrize("settings", [{}, {"LORA_RANK": 64, "LOAD_IN_4BIT": 1, "CHAT_TEMPLATE": 1}, {"JUDGE": "http://h/v1", "JUDGE_MODEL": "small"},
                                      {"JUDGE": "human", "CLEAN_START": 1, "METHODS": "naive ilr", "ROUNDS": 6}, {"LABEL_NOISE": 0.2}],
                         ids=["", "4bit", "url", "human", "noise"])
def test_dry_run_of_every_preset(preset, settings, tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", **settings)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    commands = done.stdout.splitlines()
    made = check_order(commands, tmp_path)
    at, rounds = tmp_path / "run/seed_0", settings.get("ROUNDS", 3)
    assert {f"{at}/sft/model_1", f"{at}/gold/model_1", *(f"{at}/ilr_{k}/model_1" for k in range(1, rounds + 1))} <= set(made)
    assert (f"{at}/judge/model" in made) == ("JUDGE" not in settings) and (f"{at}/dpo_3/model_1" in made) == ("METHODS" not in settings)
    compared = [c for c in commands if c.startswith("python compare.py score") or " compare.py score" in c]
    assert compared and all((f"--judge {settings['JUDGE']} " in c) for c in compared if "JUDGE" in settings)
    assert all(("--embedder" in c) == (preset == "saferpaca") and ("--judge-model small" in c) == ("JUDGE_MODEL" in settings) for c in compared)
    weak, strong = ([c for c in commands if f"sft.py --model {m} " in c] for m in (
        "mistralai/Mistral-7B-v0.1" if preset == "gsm8k-70b" else "google/gemma-2b",
        "mistralai/Mistral-7B-v0.1" if preset in ("gsm8k", "saferpaca") else "meta-llama/Meta-Llama-3-70B"))
    small = preset in ("bird", "gsm8k-70b") or "LOAD_IN_4BIT" in settings       # 70B fits one GPU in 4 bits only
    assert weak and strong and all("--load-in-4bit" not in c for c in weak) and all(("--load-in-4bit" in c) == small for c in strong)
    generated = [c for c in commands if " generate.py" in c]
    assert all(("--load-in-4bit" in c) == (small and not ("/weak/" in c.split("--data")[0] or "/judge/" in c.split("--data")[0])) for c in generated)
    models = [c for c in commands if any(f" {s} " in c for s in ("sft.py", "generate.py", "dpo.py", "compare.py"))]
    assert all(("--chat-template" in c) == ("CHAT_TEMPLATE" in settings) for c in models)
    labelled = [c for c in commands if "--source weak" in c or "--source proposal" in c]
    assert all(("--temperature 1.0" in c) == (preset == "saferpaca") for c in labelled)
    assert any("evaluate.py grade" in c and "labels" in c for c in commands) == (preset != "saferpaca")


ALL = "ilr dpo naive dpo-labels filter rft steer ensemble sft-chosen spin dpo-release dpo-coin"


@pytest.mark.parametrize("preset", ["arithmetic", "gsm8k"])
def test_every_method_is_made_in_an_order_that_works(preset, tmp_path):
    """Whatever the order of METHODS; and one stage after the other (JOBS=1) takes the same order."""
    done = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", METHODS=" ".join(reversed(ALL.split())), ROUNDS=2)
    assert (done.returncode, done.stderr) == (0, "")
    made = check_order(done.stdout.splitlines(), tmp_path)
    at = tmp_path / "run/seed_0"
    assert {f"{at}/{m}_{k}/eval_1.jsonl" for m in ALL.split() for k in (1, 2) if m != "ensemble"} | {f"{at}/ensemble_1/eval_1.jsonl"} <= set(made)
    refused = call(tmp_path / "run", tmp_path / "bases", preset, "--dry-run", METHODS="dpo rft")
    assert refused.returncode == 2 and refused.stderr == "run_ilr.sh: error: METHODS: rft needs ilr beside it\n"


@pytest.mark.parametrize("settings, flags", [
    ({}, "--beta 0.1 --lr"), ({"DPO_LOSS": "rdpo", "BETA": 0.2}, "--beta 0.2 --loss rdpo --judge {judge} --lr"),
    ({"DPO_LOSS": "hinge"}, "--beta 0.1 --loss hinge --lr"), ({"DPO_LOSS": "asft", "DPO_NLL": 0.5, "JUDGE": "oracle"}, "--loss asft --nll-weight 0.5 --lr")], ids=["", "rdpo", "hinge", "asft"])
def test_another_preference_loss(settings, flags, tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", "--dry-run", SEEDS="0 1", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    check_order(done.stdout.splitlines(), tmp_path)
    for seed in (0, 1):
        trained = [c for c in done.stdout.splitlines() if " dpo.py " in c and f"seed_{seed}/" in c]
        assert len(trained) == 3 and all(flags.format(judge=tmp_path / f"run/seed_{seed}/judge/model") in c for c in trained)
        assert settings or not any("--loss" in c or "--nll-weight" in c for c in trained)


@pytest.mark.parametrize("judge", ["oracle", "human", "http://h/v1"])
def test_losses_that_need_a_noise_rate_need_a_trained_judge(judge, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", JUDGE=judge, JUDGE_MODEL="m", DPO_LOSS="rdpo")
    assert refused.returncode == 2 and list(tmp_path.iterdir()) == []
    assert refused.stderr == f"run_ilr.sh: error: JUDGE is '{judge}': expected trained with DPO_LOSS=rdpo, whose noise rate is that of a trained judge\n"


@pytest.mark.parametrize("settings, message", [({"JUDGE_FLIPS": 0.1}, "JUDGE_FLIPS is '0.1': expected 0 with DPO_LOSS=rdpo"),
                                               ({"METHODS": "dpo spin"}, "METHODS: spin and dpo-coin ask no judge"), ({"FLIP_KIND": "odd"}, "FLIP_KIND is 'odd'")])
def test_losses_that_know_the_judges_errors_are_told_the_right_ones(settings, message, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", DPO_LOSS="rdpo", **settings)
    assert refused.returncode == 2 and message in refused.stderr and len(refused.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_help_and_dry_run_leave_nothing_behind(tmp_path):
    out, bases = tmp_path / "run", tmp_path / "bases"
    shown = call(out, bases, "--help", **TINY)
    assert shown.returncode == 0 and "ALPHA" in shown.stdout and "0.15" in shown.stdout and str(out) in shown.stdout
    dry = call(out, bases, "--dry-run", **{**TINY, "ROUNDS": 2, "SEEDS": "0 1"})
    assert dry.returncode == 0 and not out.exists() and not bases.exists()
    commands = dry.stdout.splitlines()
    assert all(line.split()[1].startswith(("tasks/", "sft.py", "generate.py", "compare.py", "refine.py", "dpo.py", "evaluate.py"))
               for line in commands)
    made = check_order(commands, tmp_path)
    assert {f"{out}/seed_{s}/{m}_{k}/model_1" for s in (0, 1) for m in ("ilr", "dpo") for k in (1, 2)} <= set(made)
    assert call(out, bases, "--dry-nun").returncode == 2 and call(out, bases, "nothing").returncode == 2 and not out.exists()


@pytest.mark.parametrize("setting", ["ALPHA=15", "ROUNDS=two", "JUDGE=Oracle", "JOBS=0", "SEEDS=a", "METHODS=sft", "SFT_LR=fast", "CLEAN_START=2", "CHECKPOINTS=5",
                                     "JUDGE=ftp://x", "LOAD_IN_4BIT=yes", "SECONDS_PER_PAIR=0", "JUDGE=https://user:secret@h/v1", "CHAT_TEMPLATE=1",
                                     "DPO_LOSS=kto", "DPO_NLL=-1", "LABEL_NOISE=1.5"])
def test_a_mistyped_setting_is_refused_at_once(setting, tmp_path):
    name, _, value = setting.partition("=")
    refused = call(tmp_path / "run", tmp_path / "bases", **{**TINY, name: value})
    assert refused.returncode == 2 and refused.stderr.startswith(f"run_ilr.sh: error: {name} is '{value}': expected ")
    assert len(refused.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings, message", [
    ({"JUDGE": "https://h/v1"}, "JUDGE_MODEL is '': expected the model"), ({"WEAK_ACCURACY": "0.5"}, "WEAK_ACCURACY is '0.5': expected 0"),
    ({"ILR_JUDGE_URL": "https://h/v1?key=secret"}, "ILR_JUDGE_URL is"), ({"EMBEDDER": "https://u@h/v1"}, "EMBEDDER is")])
def test_settings_that_would_fail_after_days_are_refused_at_once(settings, message, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", "saferpaca", **settings)
    assert refused.returncode == 2 and message in refused.stderr and list(tmp_path.iterdir()) == []


def test_a_run_that_made_nothing_may_be_begun_anew(tmp_path):
    failed = call(tmp_path / "run", tmp_path / "bases", "gsm8k", DATA_DIR=tmp_path / "nowhere", HF_HUB_OFFLINE=1, https_proxy="http://127.0.0.1:1")
    assert failed.returncode == 2 and "run_ilr.sh: DATA_DIR" in failed.stderr
    again = call(tmp_path / "run", tmp_path / "bases", "gsm8k", DATA_DIR=tmp_path / "elsewhere", https_proxy="http://127.0.0.1:1")
    assert again.returncode == 2 and "another configuration" not in again.stderr and "elsewhere" in (tmp_path / "run/config.json").read_text()


def test_four_bits_without_adapters_are_refused_at_once(tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", "gsm8k", LOAD_IN_4BIT=1)
    assert refused.returncode == 2 and "LORA_RANK is '0': expected a rank above 0" in refused.stderr and list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder_are_refused(copied):
    import fcntl
    out, bases = copied
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(out, bases, **TINY)
    assert refused.returncode == 1 and "is in use" in refused.stderr and refused.stdout == ""
