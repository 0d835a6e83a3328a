"""One step of preference training, side by side: ours, the published algorithm, TRL's DPO.

`make bench` runs it; RESULTS.md has what it found and what it does not show. All three train
the same Llama of random weights on the same rows in micro-batches of two rows, in turn in one
process, with torch's AdamW. B rows, T tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "KINETO_LOG_LEVEL": "99"}

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from report import Cell, Measured, Report, machine, versions
from torch import Tensor, nn

from wrpo_ray.llm import attention
from wrpo_ray.stages.train.loss import Answers, Wrpo, preference_loss
from wrpo_ray.stages.train.memory import FORWARD_TOKENS
from wrpo_ray.stages.train.model import Policy
from wrpo_ray.stages.train.packing import assign_micro_batches, costs, pack
from wrpo_ray.stages.train.rows import Row

PAD, END = 0, 1
MICRO_ROWS = 2
"""Rows of a micro-batch, the published script's."""
ALPHA = 0.1
LOSS = Wrpo(beta=0.01)
RATIOS = (0.4, 1.6, 4.0, 6.0)
EQUAL_RATIOS = (0.4, 4.0)
"""Prompt/answer ratios that are also measured with all lengths equal, so without padding."""
CELLS = [*(Cell(r) for r in RATIOS), *(Cell(r, equal=True) for r in EQUAL_RATIOS)]
"""What is measured."""
SIGMA = 0.6
"""Spread of the lengths, the standard deviation of their logarithms."""


# --- the model and the rows --------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of the Llama."""

    hidden: int
    layers: int
    vocabulary: int
    head: int = 64
    """Width of a head."""
    groups: int = 2
    """Query heads for each head of keys, where the number of heads allows it."""
    inner: float = 11 / 4
    """Width of the MLPs by that of the model."""

    def build(self, implementation: str, device: torch.device) -> Any:
        """The model with this attention; always the same weights. bf16 on a GPU, else fp32."""
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = self.hidden // self.head
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=int(self.hidden * self.inner),
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // self.groups if heads % self.groups == 0 else heads,
            max_position_embeddings=2**16,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:  # on the CPU, numbers for a GPU's model take as long as all its steps
            return LlamaForCausalLM._from_config(
                config, attn_implementation=implementation, dtype=dtype
            )


def make_rows(
    count: int, answer_mean: int, ratio: float, sigma: float, vocabulary: int
) -> list[Row]:
    """Rows of random tokens whose prompts are `ratio` times as long as an answer, on average."""
    rng = np.random.default_rng(0)
    prompts = spread_lengths(count, answer_mean * ratio, sigma, rng)
    answers = spread_lengths(3 * count, answer_mean, sigma, rng).reshape(count, 3)

    def ids(length: int) -> np.ndarray:
        return rng.integers(END + 1, vocabulary, length).astype(np.int32)

    return [
        Row(str(i), ids(prompt), tuple(np.append(ids(n - 1), np.int32(END)) for n in lengths))
        for i, (prompt, lengths) in enumerate(zip(prompts, answers, strict=True))
    ]


def spread_lengths(count: int, mean: float, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Log-normal lengths of this mean, in random order and at most four times the mean.

    They are the quantiles of the distribution, so that few rows have its spread too.
    """
    normal = statistics.NormalDist()
    sizes = np.exp([sigma * normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    sizes = np.minimum(sizes * mean / sizes.mean(), 4 * mean)
    return rng.permutation(np.maximum(2, sizes.round()).astype(int))


def answer_tokens(rows: Sequence[Row], answers: slice = slice(None)) -> int:
    """Tokens of all these answers of the rows."""
    return sum(len(answer) for row in rows for answer in row.answers[answers])


def pairs_of_rows(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Micro-batches in the order of the rows."""
    return (rows[i : i + MICRO_ROWS] for i in range(0, len(rows), MICRO_ROWS))


# --- the three contenders ----------------------------------------------------------------------


class Contender:
    """A model with its optimizer, and a way to compute the gradient of rows."""

    tokens: int
    """Tokens that go through the layers in a step, padding included."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model.train(), device
        # At rate 0 the work is the same, and all cells start from the same weights.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def take(self, rows: list[Row]) -> None:
        """Train on these rows from now on."""
        raise NotImplementedError

    def step(self) -> None:
        """One optimizer step on the rows."""
        self.optimizer.zero_grad(set_to_none=False)  # persistent: memory is counted above it
        self.accumulate()
        self.optimizer.step()

    def accumulate(self) -> None:
        """Add the gradient of the rows, micro-batch by micro-batch."""
        raise NotImplementedError


class Ours(Contender):
    """Packed rows that share their prompt, with stored log-probs of the reference."""

    def __init__(self, shape: Shape, device: torch.device):
        attention.register()
        super().__init__(shape.build(attention.SHARED_PROMPT, device), device)
        self.policy = Policy(self.model)

    def take(self, rows: list[Row]) -> None:
        """Set the budget, and store the log-probs of the reference."""
        lengths = np.array([row.lengths for row in rows])
        self.costs = costs(lengths, packed=True)
        self.tokens = sum(self.costs)
        self.budget = least_budget(self.costs)
        self.rows = rows
        self.rows = self.reference()

    def accumulate(self) -> None:
        """As `loop.Trainer.step` does it."""
        for part in assign_micro_batches(self.costs, 1, self.budget)[0]:
            rows = [self.rows[i] for i in part]
            batch = pack(rows).to(self.device)
            stored = torch.tensor([row.reference for row in rows], device=self.device)
            of_policy, of_reference, lengths = (
                Answers(*t.reshape(-1, 3).unbind(1))
                for t in (self.policy(batch), stored, batch.lengths)
            )
            losses = preference_loss(of_policy, of_reference, lengths, LOSS, ALPHA)
            (losses.sum() / len(self.rows)).backward()

    @torch.inference_mode()
    def reference(self) -> list[Row]:
        """The rows with log-probs of the reference, as `model.Reference` makes them.

        The policy stands in for the reference, which has the same size.
        """
        done = list(self.rows)
        for part in assign_micro_batches(self.costs, 1, FORWARD_TOKENS * self.budget)[0]:
            logps = self.policy(pack([self.rows[i] for i in part]).to(self.device))
            for i, values in zip(part, logps.reshape(-1, 3).tolist(), strict=True):
                done[i] = replace(self.rows[i], reference=tuple(values))
        return done


def least_budget(costs: list[int], rows: int = MICRO_ROWS) -> int:
    """The least token budget at which micro-batches hold so many rows on average."""
    budget = max(max(costs), sum(costs) * rows // len(costs))
    while len(assign_micro_batches(costs, 1, budget)[0]) * rows > len(costs):
        budget += 1
    return budget


class Published(Contender):
    """The published algorithm, plainly: padded sequences, all logits, a live reference."""

    def __init__(self, shape: Shape, device: torch.device):
        super().__init__(shape.build("sdpa", device), device)
        self.reference = shape.build("sdpa", device).eval().requires_grad_(False)

    def take(self, rows: list[Row]) -> None:
        """Keep them: each step collates them anew."""
        self.rows = rows
        self.tokens = sum(self.collate(part)[0].numel() for part in pairs_of_rows(rows))

    def accumulate(self) -> None:
        """Three padded sequences a row through both models."""
        for rows in pairs_of_rows(self.rows):
            ids, mask, labels = (t.to(self.device) for t in self.collate(rows))
            policy = self.logps(self.model, ids, mask, labels)
            with torch.no_grad():
                reference = self.logps(self.reference, ids, mask, labels)
            source, target, rejected = (LOSS.beta * (policy - reference)).chunk(3)
            losses = -F.logsigmoid(ALPHA * source + (1 - ALPHA) * target - rejected)
            (losses.sum() / len(self.rows)).backward()

    @staticmethod
    def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and labels (-100 but on answers), each (3B, T)."""
        pairs = [(row.prompt, row.answers[k]) for k in range(3) for row in rows]
        ids = torch.full((len(pairs), max(len(p) + len(a) for p, a in pairs)), PAD)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.from_numpy(np.concatenate([prompt, answer]))
            mask[i, :end] = 1
            labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
        return ids, mask, labels

    @staticmethod
    def logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Summed log-probs of the answers, (3B,)."""
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
        tokens = labels.clamp(min=0)[:, :, None]
        each = logits.float().log_softmax(-1).gather(2, tokens)[:, :, 0]  # (3B, T-1)
        return (each * (labels != -100)).sum(1)


class Trl(Contender):
    """TRL's DPOTrainer on the pairs (y_wt, y_l), log-probs of the reference precomputed."""

    def __init__(self, shape: Shape, device: torch.device):
        import trl.trainer.utils

        super().__init__(shape.build("sdpa", device), device)
        self.tokenizer = word_tokenizer(shape.vocabulary)
        # On a GPU TRL's head sees answer tokens only, elsewhere all: have the better of the two.
        trl.trainer.utils._use_triton = lambda device: True

    def take(self, rows: list[Row]) -> None:
        """Make a trainer, which tokenizes and computes the reference's log-probs."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            save_strategy="no",
            per_device_train_batch_size=MICRO_ROWS,
            precompute_ref_log_probs=True,
            beta=LOSS.beta,
            max_length=None,
            train_sampling_strategy="sequential",  # the same rows together as in the published
            gradient_checkpointing=False,
            bf16=False,  # the weights have the precision that all three have
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        )
        self.trainer = DPOTrainer(
            self.model,
            args=config,
            train_dataset=Dataset.from_list([as_text(row) for row in rows]),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, None),
        )
        for seen, row in zip(self.trainer.train_dataset, rows, strict=True):
            assert seen["prompt_ids"] == row.prompt.tolist()
            assert [seen["chosen_ids"], seen["rejected_ids"]] == [
                a.tolist() for a in row.answers[1:]
            ]
        self.loader = self.trainer.get_train_dataloader()
        self.trainer.current_gradient_accumulation_steps = len(self.loader)
        self.tokens = sum(batch["input_ids"].numel() for batch in self.loader)

    def accumulate(self) -> None:
        """TRL's own `training_step` on its own batches."""
        for batch in self.loader:
            self.trainer.training_step(self.model, batch)


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose text of a token is its number: TRL wants texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *map(str, range(2, vocabulary))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )


def as_text(row: Row) -> dict[str, str]:
    """The row as TRL takes it."""
    prompt, _, chosen, rejected = (" ".join(map(str, t)) for t in (row.prompt, *row.answers))
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {n: f" {a[: a.rindex(' ')]} <end>" for n, a in answers.items()}


# --- measuring ---------------------------------------------------------------------------------


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """How long it takes; on one CPU thread in CPU time, which other processes disturb less."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    gc.collect()
    synchronize(device)
    started = clock()
    action()
    synchronize(device)
    return clock() - started


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """The most tensor memory above what there was before.

    On the CPU it is the greatest running sum of all allocations, which the profiler records.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([size for _, size in sizes]).max())


def measure(
    cell: Cell, rows: list[Row], contenders: dict[str, Contender], repeats: int
) -> Measured:
    """Memory in a first step, which also warms up; then times, in turn."""
    device = contenders["ours"].device
    for contender in contenders.values():
        contender.take(rows)
    peaks = {name: peak_bytes(c.step, device) for name, c in contenders.items()}
    difference = gradients_differ(contenders["ours"].model, contenders["published"].model)
    actions = {name: c.step for name, c in contenders.items()}
    actions["reference"] = contenders["ours"].reference
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action, device))
    told = {n: [round(t, 4) for t in ts] for n, ts in times.items()}
    print(cell.name, told, peaks, f"gradients differ by {difference:.2g}", flush=True)
    return Measured(
        cell,
        {name: statistics.median(values) for name, values in times.items()},
        peaks,
        {name: c.tokens for name, c in contenders.items()},
        {"all": answer_tokens(rows), "pairs": answer_tokens(rows, slice(1, None))},
        difference,
    )


def gradients_differ(ours: nn.Module, published: nn.Module) -> float:
    """How far the gradients of the step just done are apart, as a part of their size."""
    pairs = zip(ours.parameters(), published.parameters(), strict=True)
    apart, size = 0.0, 0.0
    for own, their in pairs:
        apart += (own.grad.float() - their.grad.float()).square().sum().item()
        size += their.grad.float().square().sum().item()
    return (apart / size) ** 0.5


def check_gradients(measured: Sequence[Measured], device: torch.device) -> None:
    """Both compute the same: their gradients agree in every cell, but for bf16's rounding."""
    limit = 1e-3 if device.type == "cpu" else 0.05
    for m in measured:
        assert m.difference < limit, f"{m.cell.name}: the gradients differ by {m.difference}"


# --- the command line --------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The options; `--quick` is one small cell that writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--hidden", type=int, default=384, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=2**15)
    parser.add_argument("--answer-mean", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--rows", type=int, default=6, help="rows of a step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, after a warm-up")
    names = [cell.name for cell in CELLS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="with --device cuda"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--quick", action="store_true", help="one small cell, writes no report")
    return parser.parse_args()


def main() -> None:
    """Measure all cells and report."""
    options = parse()
    if options.quick:
        options.hidden, options.layers, options.answer_mean, options.rows = 256, 4, 24, 4
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shape = Shape(options.hidden, options.layers, options.vocabulary)
    contenders = {kind.__name__.lower(): kind(shape, device) for kind in (Ours, Published, Trl)}
    for contender in contenders.values():  # makes the gradients and the optimizer's states
        contender.take(make_rows(MICRO_ROWS, 8, 1.0, 0.0, shape.vocabulary))
        contender.step()
    measured = []
    for cell in [Cell(1.6)] if options.quick else [c for c in CELLS if c.name in options.only]:
        sigma = 0.0 if cell.equal else SIGMA
        rows = make_rows(options.rows, options.answer_mean, cell.ratio, sigma, shape.vocabulary)
        measured.append(measure(cell, rows, contenders, options.repeats))
    report = Report(measured, weights(contenders["ours"].model), vars(options), machine(device))
    print(f"\n{report.machine}; {versions()}\n\n{report.tables()}")
    check_gradients(measured, device)
    is_whole = len(measured) == len(CELLS) or device.type == "cuda"
    if is_whole and not options.quick:
        report.write(options.output)


def weights(model: Any) -> dict[str, int]:
    """How many weights the layers, the head and the whole model have."""
    parts = {"body": model.model.layers, "head": model.lm_head, "all": model}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


if __name__ == "__main__":
    main()
