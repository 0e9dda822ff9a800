"""What lm-eval is asked and finds; what needs it is left out where it is not installed (extra `language`)."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qlip.errors import InputError
from qlip.eval.language import evaluate_language, load_tasks
from qlip.eval.options import LANGUAGE_TASKS, LanguageOptions
from qlip.jobs.um3_text import evaluate_um3_text, text_view

HELLASWAG = {"activity_label": "Roof removal", "ctx_a": "A man sits on a roof."}
SIQA = {"context": "Tracy stayed.", "answerA": "rest", "answerB": "go home", "answerC": "eat"}
DOCUMENTS = {
    "arc_challenge": [
        {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "What is 2?", "choices": {"text": list("abcd"), "label": list("1234")}, "answerKey": "3"},
    ],
    "hellaswag": [
        HELLASWAG | {"ctx_b": "he", "endings": ["[a] rips  tiles [b] off.", "runs", "sits", "is"], "label": "0"},
        HELLASWAG | {"ctx_b": "they", "endings": ["go.", "come.", "stay.", "are."], "label": "3"},
    ],
    "piqa": [
        {"goal": "Cool a room?", "sol1": "Open the window.", "sol2": "Open the oven.", "label": 0},
        {"goal": "Boil an egg", "sol1": "with ice", "sol2": "with water", "label": 1},
    ],
    "social_iqa": [
        SIQA | {"question": "What does Tracy need?", "label": "3"},
        SIQA | {"question": "Why did Tracy do this?", "label": "1"},
    ],
    "winogrande": [
        {"sentence": "Ann was better than Eve so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "The cup broke since the _ was hard.", "option1": "cup", "option2": "floor", "answer": "2"},
    ],
}  # fmt: skip
FIRST = {  # what a model is asked of each first document, and the choice that it scores first
    "arc_challenge": ("Question: What is hot?\nAnswer:", " ice"),
    "hellaswag": ("Roof removal: A man sits on a roof. He", "  rips tiles off."),  # strips, then drops brackets
    "piqa": ("Question: Cool a room?\nAnswer:", " Open the window."),
    "social_iqa": ("Q: Tracy stayed. What does Tracy need?\nA:", " rest"),
    "winogrande": ("Ann was better than Eve so Ann", " won."),
}


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_arrow(path, documents):
    table = pa.Table.from_pylist(documents)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


WRITERS = {
    ".jsonl": write_jsonl,
    ".parquet": lambda path, documents: pq.write_table(pa.Table.from_pylist(documents), path),
    ".arrow": write_arrow,
}


@pytest.fixture(scope="module")
def manager():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def sets(tmp_path):
    """The five sets in a folder, in all three formats."""
    folder = tmp_path / "sets"
    folder.mkdir()
    for i, (name, documents) in enumerate(DOCUMENTS.items()):
        ending = list(WRITERS)[i % 3]
        WRITERS[ending](folder / f"{name}{ending}", documents)
    return folder


def requests(task):
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(request.doc_id, request.idx, request.args) for request in task.instances]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("name", LANGUAGE_TASKS)
def test_a_local_task_is_lm_evals_own(manager, name, ending, tmp_path, monkeypatch):
    import datasets

    WRITERS[ending](tmp_path / f"{name}{ending}", DOCUMENTS[name])
    (local,) = load_tasks(manager, [name], tmp_path, tmp_path)
    table = datasets.Dataset.from_list(DOCUMENTS[name])
    hub = datasets.DatasetDict({split: table for split in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    (own,) = load_tasks(manager, [name], None, tmp_path)
    assert own.DATASET_PATH != local.DATASET_PATH
    assert requests(local) == requests(own) and requests(local)[0] == (0, 0, FIRST[name])
    mine, theirs = list(local.eval_docs), list(own.eval_docs)
    assert list(map(local.doc_to_target, mine)) == list(map(own.doc_to_target, theirs))
    assert local.dump_config()["metric_list"] == own.dump_config()["metric_list"]


@pytest.fixture
def llama(tmp_path):
    """A random Llama that reads bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {"<s>": 0, "</s>": 1} | {
        c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / "llama"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=96, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def likeliest(folder, pairs, by_length):
    """The choice with the highest log-likelihood behind `<s>` and its prompt, computed one by one."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, choice in pairs:
        ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(choice.encode()) :]
        scores.append(float(logs.sum()) / (len(choice.strip()) if by_length else 1))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.slow
def test_accuracy_is_that_of_the_likeliest_choice(manager, llama, sets, tmp_path):
    found = evaluate_um3_text(
        str(llama), LanguageOptions(data=sets, batch_size=3, device="cpu", out=tmp_path / "out")
    )
    numbers = found["results"]["llama"]
    gold = {"arc_challenge": [1, 2], "piqa": [0, 1], "social_iqa": [2, 0], "hellaswag": [0, 3]}
    for name, answers in gold.items():
        (task,) = load_tasks(manager, [name], sets, tmp_path)
        rows = [[args for i, _, args in requests(task) if i == doc] for doc in (0, 1)]
        for metric in {"acc", "acc_norm"} - ({"acc_norm"} if name == "social_iqa" else set()):
            hits = [likeliest(llama, rows[i], metric == "acc_norm") == answers[i] for i in (0, 1)]
            assert numbers[f"{name}_{metric}"]["value"] == sum(hits) / 2, (name, metric)
    assert {"winogrande_acc"} == {name for name in numbers if name.startswith("winogrande")}
    mean = numbers["piqa_acc"]["value"]
    assert numbers["piqa_acc"]["stderr"] == pytest.approx((mean * (1 - mean)) ** 0.5)  # n − 1 = 1
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["protocol"] == "um3-text" and saved["results"] == found["results"]
    assert (
        saved["data"]["num_samples"] == 10
        and saved["data"]["sources"][0] == "arc_challenge of arc_challenge.jsonl"
    )
    assert saved["settings"]["tasks"]["piqa"] == {"documents": 2, "num_fewshot": 0, "version": 1.0}


@pytest.mark.slow
def test_the_record_counts_what_is_cut_and_knows_prompts_from_any_file(manager, llama, tmp_path):
    long = [document | {"goal": "word " * 40} for document in DOCUMENTS["piqa"]]
    hashes = []
    for ending in (".jsonl", ".parquet"):
        folder = tmp_path / ending
        folder.mkdir()
        WRITERS[ending](folder / f"piqa{ending}", long)
        options = LanguageOptions(("piqa",), folder, batch_size=2, device="cpu", out=tmp_path / "out")
        found = evaluate_language(str(llama), options)
        assert found["settings"]["sequences_cut"] == 4
        hashes.append(found["data"]["hash"])
    assert hashes[0] == hashes[1]
    one = evaluate_language(
        str(llama), LanguageOptions(("piqa",), tmp_path / ".jsonl", 1, 2, "cpu", out=tmp_path / "out")
    )
    assert one["data"]["hash"] != hashes[0] and one["data"]["num_samples"] == 1
    assert "stderr" not in one["results"]["llama"]["piqa_acc"]


def test_documents_that_are_missing_or_others(manager, tmp_path):
    with pytest.raises(InputError, match="no task 'piqua'"):
        load_tasks(manager, ["piqua"], tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"has none of piqa.jsonl, piqa.parquet, piqa.arrow: put one"):
        load_tasks(manager, ["piqa"], tmp_path, tmp_path)
    write_jsonl(tmp_path / "piqa.jsonl", [{"question": "Why?", "label": 0}])
    with pytest.raises(InputError, match=r"piqa.jsonl has no documents of piqa .*goal.*columns of the hub's set"):
        load_tasks(manager, ["piqa"], tmp_path, tmp_path)
    write_jsonl(tmp_path / "wikitext.jsonl", [{"page": "A page."}])
    with pytest.raises(InputError, match="wikitext is no multiple choice but loglikelihood_rolling"):
        load_tasks(manager, ["wikitext"], tmp_path, tmp_path)
    write_arrow(tmp_path / "piqa.arrow", DOCUMENTS["piqa"])
    with pytest.raises(InputError, match="has 2 of"):
        load_tasks(manager, ["piqa"], tmp_path, tmp_path)


@pytest.mark.slow
def test_a_folder_without_a_model(manager, sets, tmp_path):
    with pytest.raises(InputError, match="finds no causal language model"):
        evaluate_language(str(tmp_path), LanguageOptions(("piqa",), sets, device="cpu"))


def test_lm_eval_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[language\]'"):
        evaluate_language("folder", LanguageOptions())


def test_options_are_checked():
    assert LanguageOptions(("piqa,winogrande", "hellaswag")).task_names == ["piqa", "winogrande", "hellaswag"]
    for wrong in ({"limit": 0}, {"batch_size": 0}, {"tasks": ("piqa,piqa",)}, {"tasks": ("piqa,",)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            LanguageOptions(**wrong)


def test_a_text_view_of_a_stock_folder_is_itself(tmp_path):
    with text_view(str(tmp_path)) as folder:
        assert folder == str(tmp_path)
