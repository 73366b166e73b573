"""The output of a run: metrics in files and loggers, messages and progress on the terminal."""

import csv
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from litgpt.args import LogArgs
from litgpt.atomic import write_text
from litgpt.errors import UserError
from litgpt.files import open_regular
from litgpt.streams import safe, unescaped
from litgpt.text import first_line

METRICS = Path("logs") / "version_0" / "metrics.csv"  # in a run's folder, TensorBoard's events beside it
EVENTS_SUFFIX = ".litgpt"  # of TensorBoard's files, to distinguish them from those of other programs
COLUMNS = ("step", "epoch", "train_loss", "val_loss", "val_ppl", "learning_rate", "step_time", "tokens_per_second", "peak_memory_gb")
PLAIN_LINES = 20  # progress lines of a phase without a terminal


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on a CUDA device, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricLoggers:
    """`logs/version_0/metrics.csv`, TensorBoard events beside it, and Lightning's logger of the given name if it is a third one.

    A run that is resumed after step `resumed_at` continues these files; their rows of later steps are dropped. `columns`: those besides
    `COLUMNS`. Raises UserError if Lightning's logger cannot start; if it fails later, the run goes on without it.
    """

    def __init__(
        self,
        out_dir: Path,
        name: str,
        log: LogArgs,
        hyperparameters: dict[str, Any],
        resumed_at: int | None = None,
        columns: tuple[str, ...] = (),
    ) -> None:
        self.csv, self.columns = out_dir / METRICS, (*COLUMNS, *columns)
        self.purge_step = None if resumed_at is None else resumed_at + 1
        self.events: Any = None  # TensorBoard's writer, made by the first metrics
        self.remote = None if name in ("csv", "tensorboard") else remote_logger(out_dir, name, log, hyperparameters)
        if resumed_at is not None and self.csv.is_file():
            write_text(self.csv, rows_until(self.csv.read_text(encoding="utf-8", errors="replace"), resumed_at))

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row to the file at once; metrics that were not measured at this step stay empty."""
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(self.csv, "a", newline="", encoding="utf-8", opener=open_regular) as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(metrics)
        if self.events is None:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.csv.parent), purge_step=self.purge_step, filename_suffix=EVENTS_SUFFIX)
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        self._tell(lambda logger: logger.log_metrics(metrics, step))

    def flush(self) -> None:
        """Flush the rows to disk, so that they do not lag behind a checkpoint."""
        if self.csv.is_file():
            with self.csv.open("rb") as file:
                os.fsync(file.fileno())
            if self.events is not None:
                self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        self._tell(lambda logger: logger.finalize("success"))

    def _tell(self, call: Callable[[Any], None]) -> None:
        if self.remote is not None:
            try:
                call(self.remote)
            except Exception as error:  # the server is gone or its quota is used up: training matters more
                name, self.remote = type(self.remote).__name__, None
                Console().say(f"{name} failed and gets no more metrics, {METRICS} has them: {first_line(error)}")


def rows_until(text: str, step: int) -> str:
    """Return the header of a metrics file and its complete rows up to a step."""
    header, *rows = text.splitlines(keepends=True) or [""]
    width = header.count(",")

    def is_kept(row: str) -> bool:
        first, *rest = row.split(",")
        return row.endswith("\n") and len(rest) == width and first.isdigit() and int(first) <= step

    return "".join((header, *filter(is_kept, rows)))


def read_metrics(out_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return column -> (step, value) of each row with a value, from a run's metrics.csv; {} if the run has none.

    Raises UserError if the file is broken.
    """
    path = out_dir / METRICS
    columns: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return columns
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                step = int(row["step"])
                for key, text in row.items():
                    if text and key != "step":
                        columns.setdefault(key, []).append((step, float(text)))
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {number}: not a row of a run's metrics") from None
    return columns


def require_logger(name: str) -> None:
    """Raise UserError if the package of a logger is not installed."""
    if name not in ("csv", "tensorboard") and importlib.util.find_spec(name) is None:
        raise _not_installed(name, name)


def _not_installed(name: str, package: str) -> UserError:
    return UserError(f"logger_name {name!r} needs a package that is not installed ({package}): pip install it")


def remote_logger(out_dir: Path, name: str, log: LogArgs, hyperparameters: dict[str, Any]) -> Any:
    from lightning.pytorch import loggers

    logger: Any
    try:
        if name == "wandb":
            logger = loggers.WandbLogger(project=log.project, name=log.run, group=log.group, save_dir=out_dir)
        elif name == "mlflow":
            place = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"  # where MLflow itself looks for it
            logger = loggers.MLFlowLogger(experiment_name=log.project or "litgpt", run_name=log.run, tracking_uri=place)
        else:
            settings: dict[str, Any] = {"teamspace": log.teamspace, "metadata": log.metadata, "checkpoint_name": log.checkpoint_name}
            logger = loggers.LitLogger(root_dir=out_dir, name=log.run, log_model=log.log_model, save_logs=log.save_logs, **settings)
        logger.log_hyperparams(hyperparameters)
    except ModuleNotFoundError as error:
        raise _not_installed(name, error.name or name) from None
    except Exception as error:
        raise UserError(f"logger_name {name!r} cannot start: {first_line(error).rstrip('.')}. --logger_name csv works without it") from None
    return logger


class Console:
    """Messages and progress on standard error, if `active`: a bar with an ETA on a terminal, plain lines elsewhere."""

    def __init__(self, active: bool = True, verbose: bool = False) -> None:
        self.active, self.verbose = active, verbose
        self.is_terminal = active and sys.stderr.isatty()
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print a line. A closed standard error does not end the run."""
        text = safe(text)
        with suppress(OSError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, emoji=False, highlight=False)
            elif self.active:
                print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Print a line that explains the computation, if `verbose`."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def progress(self, title: str, begun: int = 0) -> Iterator[Callable[..., None]]:
        """Yield a function `(done, total, note="")`; total is None if the end is unknown. `begun` is the count at the start."""
        if self.is_terminal:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.table import Column

            kinds = (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)
            numbers = [kind(table_column=Column(no_wrap=True)) for kind in kinds]  # in a narrow terminal the bar shrinks instead
            columns = (TextColumn(title), BarColumn(), *numbers)
            try:
                with Progress(*columns, TextColumn("{task.fields[note]}"), console=RichConsole(file=unescaped(sys.stderr))) as self._bar:
                    task = self._bar.add_task(title, total=None, completed=begun, note="", visible=False)
                    yield lambda done, total, note="": self._bar.update(task, completed=done, total=total, note=note, visible=True)
            finally:
                self._bar = None
        else:
            yield self._lines(title, begun)

    def _lines(self, title: str, begun: int) -> Callable[..., None]:
        start, shown = time.perf_counter(), begun

        def update(done: int, total: int | None, note: str = "") -> None:
            nonlocal shown
            if done != total and done - shown < (total or 200) / PLAIN_LINES:
                return
            shown = done
            seconds = time.perf_counter() - start
            left = f", {(total - done) * seconds / max(done - begun, 1):.0f} s left" if total else ""
            self.say(f"{title} {done}{f' of {total}' if total else ''}  {seconds:.0f} s{left}  {note}".rstrip())

        return update
