"""Real weights and real text, where the folder of real data is at hand."""

import itertools
import json

import pytest
import torch
from hf_helpers import convert_stories260k, data_folder, minilm_folder, read_pieces

from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return convert_stories260k(data_folder(), tmp_path_factory.mktemp("stories260K"))


def merge_by_score(pieces, text):
    """Byte-pair encoding as llama2.c does it: the neighbours with the best-scored merge first, until none merge."""
    ids, scores = {}, [score for _, score in pieces]
    for i, (piece, _) in enumerate(pieces):
        ids.setdefault(piece, i)
    tokens = [ids.get(c.encode(), 3 + c.encode()[0]) for c in " " + text]
    while True:
        merges = [
            (scores[ids[pieces[a][0] + pieces[b][0]]], -i)
            for i, (a, b) in enumerate(itertools.pairwise(tokens))
            if pieces[a][0] + pieces[b][0] in ids
        ]
        if not merges:
            return [1, *tokens]
        i = -max(merges)[1]
        tokens[i : i + 2] = [ids[pieces[tokens[i]][0] + pieces[tokens[i + 1]][0]]]


def test_the_converted_tokenizer_is_llama2_cs(stories):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    pieces = read_pieces(data_folder() / "tok512.bin")
    lines = (data_folder() / "sst2.dev.jsonl").read_text().splitlines()[:200]
    for text in (json.loads(line)["text"] for line in lines):
        assert tokenizer(text)["input_ids"] == merge_by_score(pieces, text)


@torch.no_grad()
def test_the_converted_llama_knows_its_domain(stories):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(0.18, abs=0.01)


def test_lozo_adapts_the_real_llama_to_reviews(stories, tmp_path):
    """The first steps of the run in bench/real_input.py, which goes on to 3.44."""
    summary = finetune(
        Settings(
            model=str(stories),
            task="sst2",
            data_dir=str(data_folder()),
            objective="lm",
            lr=1e-4,
            max_length=48,
            steps=100,
            eval_every=100,
            eval_size=200,
            threads=1,
            output=str(tmp_path),
        ),
        quiet=True,
    )
    assert 4.2 < summary["loss_before"] < 4.5
    assert summary["loss_after"] < summary["loss_before"] - 0.25


def test_the_real_encoder_is_fine_tuned_and_scored(tmp_path):
    summary = finetune(
        Settings(
            model=str(minilm_folder()),
            task="sst2",
            data_dir=str(data_folder()),
            max_length=32,
            batch_size=4,
            steps=3,
            eval_size=32,
            threads=1,
            output=str(tmp_path),
        ),
        quiet=True,
    )
    assert summary["parameters"] > 22_000_000 and summary["objective"] == "classification"
    assert 0.2 < summary["accuracy_after"] < 0.9 and summary["loss_after"] == pytest.approx(0.69, abs=0.05)
