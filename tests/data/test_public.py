import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from data_helpers import make_tokenizer
from public_helpers import GOOD_ROWS, comparison, instructions, load, pairs, post, prompts, scored

from lit_rlhf.cli import main
from lit_rlhf.data import DataError, InstructionData, PreferenceData, PromptData, Ranking
from lit_rlhf.data.formats import FORMATS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def write_json(tmp_path):
    """Write a JSON value as a .json file over several lines; return the path."""

    def write(value, name="rows.json"):
        (tmp_path / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_gpt4_llm_pairs_are_all_responses_of_different_score(write_json):
    path = write_json([scored("a", ("b", 7.0), ("c", 9), ("d", 7.0)), scored("e", ("f", 1), ("g", 2))])
    assert pairs("gpt4_llm", path) == [("a", "c", "b"), ("a", "c", "d"), ("e", "g", "f")]
    assert [pair.where for pair in load("pairs", "gpt4_llm", path)] == ["rows.json item 1"] * 2 + ["rows.json item 2"]
    assert instructions("gpt4_llm", path) == [("a", "c"), ("e", "g")]
    assert prompts("gpt4_llm", path) == ["a", "e"]


def test_gpt4_llm_first_release(write_json):
    path = write_json([{"user_input": "a", "completion_a": "b", "completion_b": "c"}])
    assert pairs("gpt4_llm", path) == [("a", "b", "c")]


def test_the_clearest_pairs_come_first_when_they_are_limited(write_json):
    path = write_json([scored("a", ("b", 3), ("c", 9), ("d", 8)), scored("e", ("f", 1), ("g", 2))])
    assert pairs("gpt4_llm", path) == [("a", "c", "d"), ("a", "c", "b"), ("a", "d", "b"), ("e", "g", "f")]
    with pytest.warns(UserWarning, match="2 pairs beyond pairs_per_prompt=1"):
        assert pairs("gpt4_llm", path, per_prompt=1) == [("a", "c", "b"), ("e", "g", "f")]
    with pytest.warns(UserWarning, match="1 pairs beyond pairs_per_prompt=2"):
        assert pairs("gpt4_llm", path, per_prompt=2) == [("a", "c", "b"), ("a", "d", "b"), ("e", "g", "f")]


def test_what_states_no_preference_is_counted_in_one_warning(write_json):
    rows = [
        scored("a", ("b", 1), ("c", 1)),
        scored("d", ("e", 1)),
        scored("f"),
        scored("g", ("h", 1), ("h", 2), ("i", 3)),
    ]
    path = write_json(rows)
    with pytest.warns(UserWarning, match="^Format 'gpt4_llm' left out") as caught:
        assert pairs("gpt4_llm", path) == [("g", "i", "h"), ("g", "i", "h")]
    assert len(caught) == 1
    for part in (
        "1 prompts whose responses all tie",
        "2 prompts with fewer than two",
        "1 pairs whose two responses are the same",
    ):
        assert part in str(caught[0].message)
    with pytest.warns(UserWarning, match="left out: 1 prompts without a response"):
        assert instructions("gpt4_llm", path) == [("a", "b"), ("d", "e"), ("g", "i")]
    assert prompts("gpt4_llm", path) == ["a", "d", "f", "g"]


def test_no_preference_at_all_is_an_error_after_the_warning(write_json):
    path = write_json([scored("a", ("b", 1), ("c", 1))])
    with (
        pytest.warns(UserWarning, match="1 prompts whose responses all tie"),
        pytest.raises(DataError, match="no usable"),
    ):
        pairs("gpt4_llm", path)


TLDR_PROMPT = "SUBREDDIT: r/tifu\n\nTITLE: b\n\nPOST: a\n\nTL;DR:"


def test_tldr(write):
    path = write([comparison(0), comparison(1), comparison(1, second=" e")], "batch3.json")  # lines, named .json
    expected = [(TLDR_PROMPT, " c", " d"), (TLDR_PROMPT, " d", " c"), (TLDR_PROMPT, " e", " c")]
    assert pairs("tldr", path) == expected
    with pytest.warns(UserWarning, match="left out: 2 repetitions of a prompt"):
        (prompt,) = load("prompts", "tldr", path)
    assert (prompt.prompt, prompt.where) == (TLDR_PROMPT, "batch3.json:1")
    assert prompt.columns == {"id": "t3_1", "subreddit": "tifu", "title": "b", "post": "a"}
    with pytest.warns(UserWarning, match="left out: 2 repetitions of a prompt, after choosing"):
        assert instructions("tldr", path) == [(TLDR_PROMPT, " e")]  # one win; c lost one more than it won, d drew


def test_tldr_passes_over_news_articles(write):
    path = write([comparison(0), comparison(0, post=None, subreddit=None, article="news")])
    with pytest.warns(UserWarning, match="left out: 1 rows without a ranking"):
        assert pairs("tldr", path) == [(TLDR_PROMPT, " c", " d")]


def test_stack_exchange_paired(write):
    path = write([{"qid": 5, "question": "a", "date": "2020", "metadata": [], "response_j": "b", "response_k": "c"}])
    assert pairs("stack_exchange", path) == [("a", "b", "c")]
    assert load("prompts", "stack_exchange", path)[0].columns == {"qid": 5, "date": "2020", "metadata": []}


def test_stack_exchange_preferences(tmp_path):
    answers = [
        {"answer_id": i, "text": t, "pm_score": s, "selected": s == 3}
        for i, (t, s) in enumerate([("b", -1), ("c", 3), ("d", 1)])
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"qid": 5, "question": "a", "answers": answers}]), path)
    assert pairs("stack_exchange", str(path)) == [("a", "c", "d"), ("a", "c", "b"), ("a", "d", "b")]
    with pytest.warns(UserWarning, match="2 pairs beyond"):
        assert pairs("stack_exchange", str(path), per_prompt=1) == [("a", "c", "b")]
    assert instructions("stack_exchange", str(path)) == [("a", "c")]


def test_shp(write):
    path = write([post(1), post(0), post(0, second="d", ratio=7.5)], "train.json")
    assert pairs("shp", path) == [("a", "b", "c"), ("a", "c", "b"), ("a", "d", "b")]
    with pytest.warns(UserWarning, match="2 pairs beyond"):
        assert pairs("shp", path, per_prompt=1) == [("a", "d", "b")]  # rows of one prompt are limited together
    with pytest.warns(UserWarning, match="2 repetitions"):
        (prompt,) = load("prompts", "shp", path)
    assert prompt.columns == {"post_id": "p", "domain": "askhr_train", "upvote_ratio": 0.9}


def own(row):
    return [Ranking(row.data["q"], [row.data["good"], row.data["bad"]], [1, 0], row.where, {"n": row.data["n"]})]


OWN_ROWS = [{"q": "a", "good": "b", "bad": "c", "n": 1}, {"q": "a", "good": "b", "bad": "d", "n": 2}]


def test_own_format_is_a_function_of_a_row(write):
    path = write(OWN_ROWS)
    assert pairs(own, path) == [("a", "b", "c"), ("a", "b", "d")]
    with pytest.warns(UserWarning, match="Format 'own' left out: 1 repetitions of a prompt"):
        assert [row.columns for row in load("prompts", own, path)] == [{"n": 1}]
    with pytest.raises(KeyError) as caught:
        pairs(own, write([OWN_ROWS[0], {"q": "a"}]))
    assert caught.value.__notes__ == ["while converting rows.jsonl:2"]


def test_own_format_is_checked_like_columns(write):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'chosen' has an empty text"):
        pairs(own, write([{**OWN_ROWS[0], "good": ""}]))


def test_ranking_checks_its_lengths():
    with pytest.raises(ValueError, match="x:1: 2 responses, but 1 scores"):
        Ranking("a", ["b", "c"], [1], "x:1")


def ready(kind, **kwargs):
    data = kind(validation_size=0, **kwargs)
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    return data.train_dataset.examples


@pytest.mark.filterwarnings("ignore:Format 'shp' left out")
def test_data_modules(write):
    path = write([post(1), post(0, second="d", ratio=3.0)])  # b over c, d over b; the ids of a, b, c, d are 6 to 9
    assert len(ready(PreferenceData, train=path, format="shp")) == 2
    (clear,) = ready(PreferenceData, train=path, format="shp", pairs_per_prompt=1)
    assert [list(ids) for ids in (clear.prompt, clear.chosen, clear.rejected)] == [[1, 6], [9, 2], [7, 2]]
    (instruction,) = ready(InstructionData, train=path, format="shp")
    assert list(instruction.response) == [9, 2]
    (prompt,) = ready(PromptData, train=path, format="shp")
    assert prompt.columns["domain"] == "askhr_train"


def test_validation_source_has_the_same_format(write):
    data = PreferenceData(train=write([post(1)]), validation=write([post(0)], "val.jsonl"), format="shp")
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    assert list(data.val_dataset[0].chosen) == [8, 2]


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (PromptData, {"format": "tlrd"}, "format must be one of auto, columns, hh, gpt4_llm, .*'tlrd'"),
        (PromptData, {"format": "tldr", "prompt_column": "x"}, "options act on formats auto, columns, hh only"),
        (InstructionData, {"format": "tldr", "response_column": "x"}, "response_column does not act on"),
        (PreferenceData, {"format": "hh", "pairs_per_prompt": 1}, "pairs_per_prompt does not act on format 'hh'"),
        (PreferenceData, {"format": "shp", "pairs_per_prompt": 0}, "pairs_per_prompt must be at least 1"),
    ],
)
def test_arguments_that_do_not_go_together(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kind(train="x.jsonl", **kwargs).check_settings()


HH_ROW = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
FRAGMENTS = sorted((EXPERIMENTS / "datasets").glob("*.yaml"))


def test_there_is_a_fragment_for_each_format():
    assert {path.stem for path in FRAGMENTS} == {*FORMATS, "hh"}


@pytest.mark.filterwarnings("ignore:Format 'oasst' left out")
@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_fragment_reads_its_format(path, write):
    arguments = yaml.safe_load(path.read_text())["data"]["init_args"]
    arguments["train"] = write([{**GOOD_ROWS, "hh": HH_ROW}[path.stem]])
    for kind in (PreferenceData, InstructionData, PromptData):
        assert ready(kind, **arguments)


@pytest.mark.parametrize("stage", ["hydra_sft", "ppo"])
@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_fragment_composes_with_a_stage(path, stage, capsys):
    stage_file = EXPERIMENTS / "own_pairs" / f"{stage}.yaml"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "-c", str(stage_file), "-c", str(path), "--data.train", "x.jsonl", "--print_config"])
    assert not caught.value.code
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"].endswith({"hydra_sft": "PreferenceData", "ppo": "PromptData"}[stage])
    assert (data["init_args"]["format"], data["init_args"]["train"]) == (path.stem, "x.jsonl")


def test_own_format_by_import_path_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_data.py").write_text("def convert(row):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    stage_file = EXPERIMENTS / "own_pairs" / "hydra_sft.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(stage_file), "--data.format", "my_data.convert", "--print_config"])
    assert "format: my_data.convert\n" in capsys.readouterr().out
