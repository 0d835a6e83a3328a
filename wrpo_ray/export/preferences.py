"""Export of the preference rows: a JSONL or Parquet file, or a data set with its card."""

from collections.abc import Callable

from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.export.card_parts import CARD
from wrpo_ray.export.dataset_card import card
from wrpo_ray.export.dataset_files import NO_ROWS, is_file, write_file, write_folder
from wrpo_ray.export.forms import Form
from wrpo_ray.export.run_facts import run_facts
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.failed_rows import jobs_of
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.storage.folder import Folder, check_writable
from wrpo_ray.storage.steps import Step


def export_preferences(
    config: Config, to: str, form: Form, before: Callable[[], None] = lambda: None
) -> int:
    """Write the preference rows to a .jsonl or .parquet file, or as a dataset folder with a card.

    Return the number of rows written. `before` is called when the rows are known to be there.

    Raises:
        UserError: the preference step is not done or has no rows, or `to` is not writable.
    """
    config = pinned(config)
    chain = Chain(config, "pair")
    jobs, place = jobs_of(chain), Folder(to).absolute()
    step: Step = jobs[-1][1].step
    if not step.is_done(chain.root):
        raise UserError("export: the preference rows are not there yet; run `wrpo pair` first")
    if not step.read_manifest(chain.root)["counts"]["rows"]:
        raise UserError(NO_ROWS)
    before()
    if is_file(place):
        return write_file(chain.root / step.folder, place, form)
    check_writable(place, "--to")
    statistics = write_folder(chain.root / step.folder, place, form)
    text = card(form, statistics, run_facts(config, chain.root, jobs))
    place.write(CARD, text.encode())
    return statistics.rows * form.rows_each
