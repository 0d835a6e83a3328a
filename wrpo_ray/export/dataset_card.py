"""The dataset card: README.md with the metadata that the Hugging Face hub reads."""

from collections import Counter
from collections.abc import Iterator

from wrpo_ray.export.card_parts import CardFacts, fenced_settings, models_table, steps_table, table
from wrpo_ray.export.dataset_files import DATA
from wrpo_ray.export.forms import Form
from wrpo_ray.export.statistics import BINS, Statistics
from wrpo_ray.text.display import fenced, one_line

BAR = 24
"""Length of a histogram's longest bar, in characters."""
COLUMNS = {
    "published": {
        "prompt_id": "hash of the prompt",
        "prompt": "the conversation that is answered",
        "chosen": "two answers: y_ws, the best of all sources, and y_wt, the target's own best",
        "rejected": "one answer: y_l, the target's own worst",
    },
    "trl": {
        "prompt": "the conversation that is answered",
        "chosen": "the preferred answer",
        "rejected": "the target's own worst answer",
    },
    "records": {
        "prompt_id": "hash of the prompt",
        "messages": "the conversation that is answered",
        "source_chosen": "y_ws, the best answer of all sources, with its source and reward",
        "target_chosen": "y_wt, the target's own best answer",
        "rejected": "y_l, the target's own worst answer",
        "source_margin": "reward of y_ws less that of y_wt",
        "target_margin": "reward of y_wt less that of y_l",
        "candidates": "source, sample number and reward of every answer to the prompt",
    },
}


def card(form: Form, statistics: Statistics, facts: CardFacts) -> str:
    """The whole README.md."""
    sections = {
        "Rows": _rows(form, statistics),
        "Models": _models(facts),
        "How they were made": fenced_settings(facts.settings),
        "Counts": steps_table(facts),
        "y_ws by source": _wins(statistics),
        "Rewards": _rewards(statistics),
        "Lengths": _lengths(statistics),
        "Failed rows": _failures(facts),
        "Versions": table(("package", "version"), facts.versions.items()),
    }
    parts = [_front_matter(form, statistics, facts), _introduction(form, statistics)]
    for title, lines in sections.items():
        body = "\n".join(lines)
        parts += [f"## {title}\n\n{body}"] if body else []
    return "\n\n".join(parts) + "\n"


def _front_matter(form: Form, statistics: Statistics, facts: CardFacts) -> str:
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license=_license(facts),
        task_categories=["text-generation"],
        size_categories=size_category(statistics.rows * form.rows_each),
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": f"{DATA}/train-*"}],
            }
        ],
        tags=["preference", "wrpo", "model-fusion", *(["trl", "dpo"] * (form.name == "trl"))],
    )
    return f"---\n{data.to_yaml()}\n---"


def _license(facts: CardFacts) -> str:
    """The licence that all answering models share; else `other`, or `unknown`."""
    found = {m.license for m in facts.models if m.role != "reward"}
    if not found - {None}:
        return "unknown"
    return next(iter(found)) or "unknown" if len(found) == 1 else "other"


def size_category(rows: int) -> str:
    """The hub's size category for a number of rows, such as `10K<n<100K`."""
    power = len(str(rows)) - 1
    return f"{_short(power)}<n<{_short(power + 1)}" if power >= 3 else "n<1K"


def _short(power: int) -> str:
    return f"{10 ** (power % 3)}{'KMBT'[power // 3 - 1]}"


def _introduction(form: Form, statistics: Statistics) -> str:
    rows = statistics.rows * form.rows_each
    return (
        "# Preference rows of a model fusion\n\n"
        f"{rows:,} rows for preference training of a target model on answers of several source "
        "models, by\nWeighted-Reward Preference Optimization "
        "([arXiv 2412.03187](https://arxiv.org/abs/2412.03187)), made with wrpo_ray.\n\n"
        "```python\n"
        "from datasets import load_dataset\n\n"
        'rows = load_dataset("path/to/this/folder", split="train")\n'
        "```"
    )


def _rows(form: Form, statistics: Statistics) -> Iterator[str]:
    columns = dict(COLUMNS[form.name])
    if form.name == "trl":
        which = {"target": "y_wt, the target's own best", "source": "y_ws, the best of all sources"}
        told = which.get(form.pairs, "y_ws in one row, y_wt in the next")
        columns["chosen"] = f"the preferred answer: {told}"
    yield from table(("column", "content"), columns.items())
    if form.rows_each > 1:
        yield f"\nEach of {statistics.rows:,} prompts has {form.rows_each} rows."


def _models(facts: CardFacts) -> Iterator[str]:
    yield from models_table(facts)
    answered = {m.license or "unknown" for m in facts.models if m.role != "reward"}
    if len(answered) > 1:
        yield "\nThe answers come from models under different licences; each row is under its"
        yield "models' terms (`records` names the source of each answer), and the prompts under"
        yield "their own."


def _wins(statistics: Statistics) -> Iterator[str]:
    if statistics.wins:
        yield from _histogram(dict(statistics.wins.most_common()), "source")


def _rewards(statistics: Statistics) -> Iterator[str]:
    if not statistics.rewards:
        return
    edges = statistics.edges
    names = {i: f"{edges[i]:.4g} to {edges[i + 1]:.4g}" for i in range(BINS)}
    yield from _histograms(statistics.rewards, names, "reward")


def _lengths(statistics: Statistics) -> Iterator[str]:
    found = {e for counts in statistics.lengths.values() for e in counts}
    low, high = min(found, default=0), max(found, default=0)
    names = {e: f"below {2**e:,}" for e in range(low, high + 1)}
    yield from _histograms(statistics.lengths, names, "characters")


def _failures(facts: CardFacts) -> Iterator[str]:
    told = [
        (f["step"], f["error"], f"{f['rows']:,}", one_line(f["message"])[:100])
        for f in facts.failures
    ]
    yield from table(("step", "error", "rows", "example"), told) if told else ["None."]


# --- tables and bars ---------------------------------------------------------------------------


def _histogram(counts: dict[str, int], title: str) -> Iterator[str]:
    most = max(counts.values())
    told = {one_line(name): number for name, number in counts.items()}
    width = max(len(name) for name in [title, *told])
    lines = [f"{title:{width}}  {'rows':>10}"]
    for name, number in told.items():
        bar = "█" * round(BAR * number / most)
        lines.append(f"{name:{width}}  {number:>10,}  {bar}".rstrip())
    yield fenced("\n".join(lines))


def _histograms(
    counts: dict[str, Counter[int]], names: dict[int, str], title: str
) -> Iterator[str]:
    """One table with a column of numbers for each of several histograms over the same bins."""
    width = max(len(name) for name in [title, *names.values()])
    yield "```"
    yield f"{title:{width}}" + "".join(f"{column:>12}" for column in counts)
    for bin_, name in names.items():
        cells = "".join(f"{column[bin_]:>12,}" for column in counts.values())
        yield f"{name:{width}}{cells}"
    yield "```"
