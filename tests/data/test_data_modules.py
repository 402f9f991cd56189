from unittest.mock import patch

import pytest
import torch
from data_helpers import Recorder, fit, make_tokenizer, pair_row
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_rlhf.data import DataError, InstructionData, PreferenceData, PromptData
from lit_rlhf.errors import ConfigError

LETTERS = "abcdefghijklmnopqrst"
PAIRS = [pair_row(p, f"{p} {r}", r, id=f"{p}{r}") for p, r in zip(LETTERS, "ab" * 10, strict=True)]  # 20 rows


@pytest.fixture
def source(write):
    return write(PAIRS)


def ready(kind, source, tokenizer=None, **kwargs):
    data = kind(train=source, **kwargs)
    data.tokenizer = tokenizer or make_tokenizer()
    data.setup("fit")
    return data


def ids(dataset):
    return [example.columns["id"] for example in dataset]


def test_split_is_a_seeded_partition(source):
    first, again, other = (ready(PromptData, source, validation_size=6, split_seed=seed) for seed in (0, 0, 1))
    train, val = ids(first.train_dataset), ids(first.val_dataset)
    assert sorted(train + val) == sorted(row["id"] for row in PAIRS)
    assert len(val) == 6
    assert (ids(again.train_dataset), ids(again.val_dataset)) == (train, val)
    assert set(ids(other.val_dataset)) != set(val)


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (0.0, 0), (3, 3), (0.25, 5), (0.001, 1), (19, 19)])
def test_validation_size_is_a_count_or_a_fraction(source, size, expected):
    data = ready(PromptData, source, validation_size=size)
    assert (len(data.val_dataset), data.num_prompts) == (expected, 20 - expected)


def test_rows_with_one_prompt_stay_on_one_side_of_the_split(write):
    rows = [pair_row(p, f"{p} {r}", r, id=f"{p}{r}") for p in LETTERS for r in "ab"]
    data = ready(PromptData, write(rows), validation_size=5)
    train, val = ({name[0] for name in ids(part)} for part in (data.train_dataset, data.val_dataset))
    assert not train & val
    assert 5 <= len(data.val_dataset) <= 10


@pytest.mark.parametrize(
    ("rows", "prompts", "size", "held_out"),
    [(1000, 20, 50, 50), (1000, 20, 60, 100), (1000, 20, 1, 50), (800, 40, 0.05, 40), (100, 2, 90, 50)],
)
def test_validation_takes_whole_prompts_until_its_rows_are_reached(write, rows, prompts, size, held_out):
    source = write([pair_row(LETTERS[i % prompts % 20] + " a" * (i % prompts // 20), "c", id=i) for i in range(rows)])
    data = ready(PreferenceData, source, validation_size=size)
    assert (len(data.val_dataset), len(data.train_dataset)) == (held_out, rows - held_out)


def test_one_prompt_with_most_rows_is_no_validation_data(write):
    source = write([pair_row("a" if i < 90 else LETTERS[i - 90 + 1], "c") for i in range(100)])
    for seed in range(5):
        assert len(ready(PreferenceData, source, validation_size=5, split_seed=seed).val_dataset) == 5


def test_rows_and_prompts_of_both_parts_are_logged(write, caplog):
    source = write([pair_row(LETTERS[i % 4], "c") for i in range(20)])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        ready(PreferenceData, source, validation_size=5)
    assert "Training data: 15 rows over 3 prompts; validation: 5 rows over 1 prompt." in caplog.text


def test_one_prompt_cannot_be_split(write):
    with pytest.raises(DataError, match="all rows share one prompt"):
        ready(PreferenceData, write([pair_row("a", "c")] * 20), validation_size=5)


def test_validation_must_leave_rows_to_train_on(source):
    with pytest.raises(DataError, match="splitting 20 validation rows off 20 leaves none to train on"):
        ready(PromptData, source, validation_size=20)


def test_limit_takes_the_first_of_the_shuffle(source):
    every = ready(PromptData, source, validation_size=0)
    few = ready(PromptData, source, validation_size=0, limit=5)
    assert ids(few.train_dataset) == ids(every.train_dataset)[:5]


def test_own_validation_source(source, write):
    held_out = write([pair_row("a", "b", "c", id="v")], "val.jsonl")
    data = ready(PromptData, source, validation=held_out)
    assert ids(data.val_dataset) == ["v"]
    assert data.num_prompts == 20


def test_several_sources(source, write):
    assert ready(PromptData, [source, write(PAIRS[:3], "more.jsonl")], validation_size=0).num_prompts == 23


def test_setup_reads_once(source):
    data = ready(PromptData, source)
    before = data.train_dataset
    with patch("lit_rlhf.data.base.load_records", side_effect=AssertionError):
        data.setup("validate")
    assert data.train_dataset is before


def test_bad_rows_stop_setup_or_are_skipped(write):
    source = write([*PAIRS, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:21: field 'chosen' is missing"):
        ready(PreferenceData, source)
    with pytest.warns(UserWarning, match="Skipped 1 bad rows: 1 x missing field 'chosen'"):
        data = ready(PreferenceData, source, on_bad_row="skip")
    assert len(data.train_dataset) + len(data.val_dataset) == 20


@pytest.mark.filterwarnings("ignore:Length limits")
def test_limits_that_leave_nothing_are_an_error(source):
    with pytest.raises(DataError, match="none of the 19 training rows is left"):
        ready(PreferenceData, source, max_response_length=1, truncated_response="drop")


@pytest.mark.parametrize(
    ("kind", "kwargs", "fragments"),
    [
        (PromptData, {"limit": 0, "batch_size": 0}, ["limit must", "batch_size must"]),
        (PromptData, {"validation_size": 1.5}, ["validation_size 1.5 is not a fraction below 1"]),
        (
            PromptData,
            {"validation_size": -1, "num_workers": -1},
            ["validation_size must", "num_workers must"],
        ),
        (PromptData, {"max_prompt_length": 0}, ["max_prompt_length must"]),
        (PreferenceData, {"max_response_length": 0, "eval_batch_size": 0}, ["max_response", "eval_batch"]),
        (
            PreferenceData,
            {"limit": 0, "max_response_length": 0, "pairs_per_prompt": 0, "format": "tlrd"},
            ["limit must", "max_response_length must", "pairs_per_prompt must", "format must be one of"],
        ),
        (
            InstructionData,
            {"batch_size": 0, "format": "shp", "response_column": "x"},
            ["batch_size must", "response_column does not act"],
        ),
    ],
)
def test_arguments_are_checked_together(kind, kwargs, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (matched below)
        kind(train="x.jsonl", **kwargs).check_settings()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_settings_changed_after_construction_are_checked_before_reading():
    data = PromptData(train="nowhere.jsonl")
    data.batch_size = 0
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("kind", "own", "absent"),
    [
        (PreferenceData, "group_by_length", "response_column"),
        (InstructionData, "response_column", "buffer"),
        (PromptData, "max_prompt_length", "max_response_length"),
    ],
)
def test_command_line_offers_exactly_the_arguments_that_act(kind, own, absent):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    config = parser.parse_args(["--data.train=x.jsonl", "--data.validation_size=0.1", "--data.limit=7"])
    # jsonargparse 4.5x renamed the method; the older name serves our lower bound.
    built = getattr(parser, "instantiate", parser.instantiate_classes)(config).data
    assert (built.sources, built.validation_size, built.limit) == (["x.jsonl"], 0.1, 7)
    assert own in config.data
    assert absent not in config.data
    assert {"train", "format", "on_bad_row", "batch_size"} <= set(config.data.keys())


def test_preference_batches_through_a_trainer(source):
    module = Recorder(make_tokenizer())
    data = PreferenceData(train=source, validation_size=4, batch_size=6, eval_batch_size=3)
    fit(module, data, max_epochs=2)
    assert [epoch for epoch, _ in module.train_batches] == [0, 0, 0, 1, 1, 1]
    assert [len(batch["mask"]) for _, batch in module.train_batches] == [12, 12, 8] * 2
    assert [len(batch["mask"]) for batch in module.val_batches] == [6, 2] * 2
    for _, batch in module.train_batches:
        n, width = len(batch["mask"]) // 2, batch["mask"].shape[1]
        prompt = batch["tokens"].shape[1] - width
        assert torch.equal(batch["tokens"][:n, :prompt], batch["tokens"][n:, :prompt])
        assert batch["mask"].sum(1).tolist() == [3] * n + [2] * n  # "p r </s>" against "r </s>"


def test_order_changes_with_the_epoch_and_not_between_runs(source):
    def run():
        module = Recorder(make_tokenizer())
        fit(module, PreferenceData(train=source, validation_size=0, batch_size=20), max_epochs=2)
        return [batch["tokens"] for _, batch in module.train_batches]

    first, second = run()
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(run()[1], second)


def test_instruction_batches_through_a_trainer_with_workers(source):
    module = Recorder(make_tokenizer(pad_token=None))
    fit(module, InstructionData(train=source, validation_size=0, batch_size=10, num_workers=1))
    assert len(module.train_batches) == 2
    assert not module.val_batches
    for _, batch in module.train_batches:
        assert batch["mask"].all()  # EOS is the pad id here, and counts
        assert (batch["tokens"][:, -1] == 2).all()


def test_each_rank_of_a_distributed_run_gets_its_own_examples(source):
    def seen(rank):
        data = ready(PreferenceData, source, validation_size=0, batch_size=4)
        with patch.object(data, "trainer") as trainer:
            trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}
            loader = data.train_dataloader()
        return loader, set(loader.sampler)

    (loader, first), (_, second) = seen(0), seen(1)
    assert len(first) == len(second) == 10
    assert not first & second
    # Lightning replaces samplers of distributed runs unless they are of this class.
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)


def test_own_tokenizer_comes_before_the_modules(source):
    data = PreferenceData(train=source)
    data.tokenizer = make_tokenizer()
    fit(Recorder(tokenizer=None), data)
    assert data.pad_id == 0


def test_missing_tokenizer(source):
    with pytest.raises(MisconfigurationException, match="PreferenceData has no tokenizer"):
        fit(Recorder(tokenizer=None), PreferenceData(train=source))


def test_using_a_module_before_setup(source):
    with pytest.raises(MisconfigurationException, match="call setup"):
        PromptData(train=source).prompt_batch([0])


def test_prompt_batch(write):
    rows = [{"prompt": "a b c", "id": 0}, {"prompt": "d", "id": 1}, {"prompt": "e f", "id": 2}]
    data = ready(PromptData, write(rows), validation_size=0)
    place = {example.columns["id"]: index for index, example in enumerate(data.train_dataset)}
    batch = data.prompt_batch([place[1], place[0], place[1]])
    assert batch["tokens"].tolist() == [[0, 0, 1, 9], [1, 6, 7, 8], [0, 0, 1, 9]]
    assert batch["attention_mask"].tolist() == [
        [False, False, True, True],
        [True] * 4,
        [False, False, True, True],
    ]
    assert batch["prompts"] == ["d", "a b c", "d"]
    assert batch["columns"] == {"id": [1, 0, 1]}


def test_prompts_train_on_the_rollout_buffer(source):
    module = Recorder(make_tokenizer())
    module.rollout_buffer = range(2)
    data = PromptData(train=source, validation_size=5, batch_size=3)
    fit(module, data)
    assert [batch for _, batch in module.train_batches] == [0, 1]
    assert [len(batch["prompts"]) for batch in module.val_batches] == [3, 2]
    assert data.train_dataloader() is module.rollout_buffer
    assert isinstance(data.val_dataloader(), DataLoader)


def test_prompts_without_a_rollout_buffer(source):
    with pytest.raises(MisconfigurationException, match=r"PromptData is for on-policy.*Recorder has none"):
        fit(Recorder(make_tokenizer()), PromptData(train=source))


def test_hub_sources_are_fetched_before_setup():
    with patch("lit_rlhf.data.base.load_hub") as load:
        PromptData(train=["hub:a/b", "x.jsonl"], validation="hub:a/b:test").prepare_data()
    assert [call.args for call in load.call_args_list] == [("hub:a/b",), ("hub:a/b:test",)]


def test_grouping_by_length_can_be_switched_off(write):
    source = write([{"prompt": "a", "response": "b " * n} for n in range(1, 41)])

    def widths(group):
        data = ready(InstructionData, source, validation_size=0, batch_size=4, group_by_length=group)
        return sum(batch["tokens"].shape[1] for batch in data.train_dataloader())

    assert widths(True) == sum(range(4, 41, 4)) + 10 * 3  # each batch as wide as its longest row, plus <bos> a </s>
    assert widths(False) > 1.2 * widths(True)
